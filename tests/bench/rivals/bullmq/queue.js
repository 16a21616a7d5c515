// What both sides share: the queue and its connection.
import { Redis } from "ioredis";

export const QUEUE = "attributes";

export const connect = () => new Redis(process.env.IMATTR_REDIS_URL, { maxRetriesPerRequest: null });
