// What both sides share: the queue and its connection.
import { Redis } from "ioredis";

export const QUEUE = "attributes";

// As the documents have it for workers: commands wait for the connection to come back. ioredis asks the sentinels itself.
const options = { maxRetriesPerRequest: null };

export function connect() {
  const [scheme, rest] = process.env.IMATTR_REDIS_URL.split("://");
  if (scheme !== "redis+sentinel") return new Redis(process.env.IMATTR_REDIS_URL, options);
  const [places, name] = rest.split("/");
  const sentinels = places.split(",").map((place) => place.split(":")).map(([host, port]) => ({ host, port: Number(port) }));
  return new Redis({ sentinels, name, ...options });
}
