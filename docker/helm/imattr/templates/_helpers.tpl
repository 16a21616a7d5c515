{{- define "imattr.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* The release and the chart, or only one if it contains the other. Components add at most 13 characters. */}}
{{- define "imattr.fullname" -}}
{{- $name := include "imattr.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels that select a component's pods. Takes (list $ "worker"). */}}
{{- define "imattr.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "imattr.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Name, namespace and labels of an object. Takes (list $ "worker"). */}}
{{- define "imattr.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "imattr.fullname" $root }}-{{ index . 1 }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "imattr.labels" . | nindent 2 }}
{{- end -}}

{{- define "imattr.labels" -}}
{{- $root := index . 0 -}}
{{ include "imattr.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "imattr.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "imattr.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* A number or word as text. Helm reads numbers as floats, and would write 1000000 as 1e+06. */}}
{{- define "imattr.text" -}}
{{- if kindIs "string" . }}{{ . | quote }}{{ else }}{{ toJson . | quote }}{{ end -}}
{{- end -}}

{{/* The settings that all processes share, without secrets. */}}
{{- define "imattr.settings" -}}
IMATTR_SDKAPPID: {{ include "imattr.text" .Values.app.sdkappid }}
{{- with .Values.app.region }}
IMATTR_REGION: {{ . | quote }}
{{- end }}
{{- with .Values.app.apiUrl }}
IMATTR_API_URL: {{ . | quote }}
{{- end }}
{{- if .Values.redis.internal.enabled }}
IMATTR_REDIS_URL: {{ printf "redis://%s-redis:6379/0" (include "imattr.fullname" .) | quote }}
{{- else if .Values.redis.url }}
IMATTR_REDIS_URL: {{ .Values.redis.url | quote }}
{{- end }}
{{- with .Values.broker.url }}
IMATTR_BROKER_URL: {{ . | quote }}
{{- end }}
{{- range $name, $value := .Values.settings }}
IMATTR_{{ $name }}: {{ include "imattr.text" $value }}
{{- end }}
{{- end -}}

{{/*
Where the secrets are, as variables. Takes (list $ file): "secret-key" for anything that calls the API, "console-accounts" for the console, "" for all others.
*/}}
{{- define "imattr.secrets" -}}
{{- $root := index . 0 -}}
{{- $files := dict "secret-key" "IMATTR_SECRET_KEY_FILE" "console-accounts" "IMATTR_CONSOLE_ACCOUNTS_FILE" }}
{{- with index . 1 }}
- name: {{ index $files . }}
  value: /run/secrets/imattr/{{ . }}
{{- end }}
{{- range $name, $from := dict "REDIS" $root.Values.redis "BROKER" $root.Values.broker }}
{{- if and $from.existingSecret $from.urlKey }}
- name: IMATTR_{{ $name }}_URL
  valueFrom:
    secretKeyRef: {name: {{ $from.existingSecret }}, key: {{ $from.urlKey }}}
{{- else if $from.existingSecret }}
- name: IMATTR_{{ $name }}_PASSWORD_FILE
  value: /run/secrets/imattr/{{ lower $name }}-password
{{- end }}
{{- end }}
{{- end -}}

{{- define "imattr.environment" -}}
envFrom:
  - configMapRef:
      name: {{ include "imattr.fullname" . }}-settings
{{- end -}}

{{/* Which keys of which Secrets are files. Takes (list $ file). */}}
{{- define "imattr.files" -}}
{{- $root := index . 0 -}}
{{- $redis := $root.Values.redis -}}
{{- $broker := $root.Values.broker -}}
{{- $owners := dict "secret-key" $root.Values.app "console-accounts" $root.Values.console }}
{{- with index . 1 }}
- secret:
    name: {{ (index $owners .).existingSecret }}
    items: [{key: {{ (index $owners .).secretKey }}, path: {{ . }}}]
{{- end }}
{{- if and $redis.existingSecret (not $redis.urlKey) }}
- secret:
    name: {{ $redis.existingSecret }}
    items: [{key: {{ $redis.passwordKey }}, path: redis-password}]
{{- end }}
{{- if and $broker.existingSecret (not $broker.urlKey) }}
- secret:
    name: {{ $broker.existingSecret }}
    items: [{key: {{ $broker.passwordKey }}, path: broker-password}]
{{- end }}
{{- end -}}

{{/* Every pod's volumes: /tmp, since nothing else is writable, and the secrets. Takes (list $ file). */}}
{{- define "imattr.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 256Mi}
{{- with include "imattr.files" . | trim }}
- name: secrets
  projected:
    # For root and the group: fsGroup makes that the group of the pod's user.
    defaultMode: 0440
    sources:
      {{- . | nindent 6 }}
{{- end }}
{{- with (index . 0).Values.redis.tlsSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "imattr.mounts" -}}
- {name: tmp, mountPath: /tmp}
{{- if include "imattr.files" . | trim }}
# The whole directory: a single file would never change.
- {name: secrets, mountPath: /run/secrets/imattr, readOnly: true}
{{- end }}
{{- if (index . 0).Values.redis.tlsSecret }}
- {name: tls, mountPath: /run/secrets/imattr-tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* What all pods have in common. */}}
{{- define "imattr.pod" -}}
automountServiceAccountToken: false
# Kubernetes would set IMATTR_..._PORT for each Service whose name begins with imattr.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* What all our containers have in common. */}}
{{- define "imattr.container" -}}
{{- $image := .Values.image -}}
image: {{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .Chart.AppVersion $image.tag }}{{ end }}
imagePullPolicy: {{ $image.pullPolicy }}
{{ include "imattr.confined" . }}
{{- end -}}

{{- define "imattr.confined" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/*
Seconds that a worker may need from SIGTERM to its end. It begins no batch after SIGTERM, so what is left is one deliver task
at most: `Settings.longest_task`, which is 2 x PATIENCE + LEASE + CONNECT_TIMEOUT + READ_TIMEOUT. Its other threads end
meanwhile; 10 s are for the rest. A worker that is killed sooner loses nothing, but its users wait for the end of their lease.
*/}}
{{- define "imattr.needsToStop" -}}
{{- $set := .Values.settings -}}
{{- $longest := addf (mulf 2 (default 2 $set.PATIENCE)) (default 60 $set.LEASE) (default 3.05 $set.CONNECT_TIMEOUT) (default 10 $set.READ_TIMEOUT) -}}
{{- add (ceil $longest) 10 -}}
{{- end -}}

{{- define "imattr.gracePeriod" -}}
{{- $needed := include "imattr.needsToStop" . | int -}}
{{- $given := .Values.worker.terminationGracePeriodSeconds | int -}}
{{- if and $given (lt $given $needed) -}}
{{- fail (printf "worker.terminationGracePeriodSeconds is %d, and with these settings a worker may need %d to finish what it is sending" $given $needed) -}}
{{- end -}}
{{- default $needed $given -}}
{{- end -}}

{{/* What values.schema.json cannot express. */}}
{{- define "imattr.check" -}}
{{- $v := .Values -}}
{{- if eq (empty $v.app.region) (empty $v.app.apiUrl) -}}
{{- fail "set app.region or app.apiUrl, and not both" -}}
{{- end -}}
{{- $places := 0 -}}
{{- range list $v.redis.internal.enabled $v.redis.url $v.redis.urlKey -}}
{{- if . -}}{{- $places = add1 $places -}}{{- end -}}
{{- end -}}
{{- if ne (int $places) 1 -}}
{{- fail "set one of redis.url, redis.urlKey and redis.internal.enabled" -}}
{{- end -}}
{{- if and (or $v.redis.urlKey $v.redis.internal.enabled) (not $v.redis.existingSecret) -}}
{{- fail "redis.urlKey and redis.internal.enabled need redis.existingSecret" -}}
{{- end -}}
{{- if and $v.broker.url $v.broker.urlKey -}}
{{- fail "set broker.url or broker.urlKey, not both" -}}
{{- end -}}
{{- if and $v.broker.existingSecret (not (or $v.broker.url $v.broker.urlKey)) -}}
{{- fail "broker.existingSecret is for broker.url or broker.urlKey: without them the broker is Redis" -}}
{{- end -}}
{{- if and $v.broker.urlKey (not $v.broker.existingSecret) -}}
{{- fail "broker.urlKey needs broker.existingSecret" -}}
{{- end -}}
{{- if and $v.flower.enabled (not $v.flower.existingSecret) -}}
{{- fail "flower.existingSecret is not set: Flower needs a login. Or set flower.enabled=false" -}}
{{- end -}}
{{- with $v.console -}}
{{- if and .enabled (not .existingSecret) -}}
{{- fail "console.existingSecret is not set: the console needs accounts. Or set console.enabled=false" -}}
{{- end -}}
{{- if and .proxy.header (not .proxy.addresses) -}}
{{- fail "console.proxy.header needs console.proxy.addresses: anybody else could send that header" -}}
{{- end -}}
{{- if and .proxy.operators (not .proxy.header) -}}
{{- fail "console.proxy.operators needs console.proxy.header, which names the user" -}}
{{- end -}}
{{- if and .ingress.host (not .ingress.tlsSecret) -}}
{{- fail "console.ingress.host needs console.ingress.tlsSecret: passwords go through it" -}}
{{- end -}}
{{- if and .ingress.host $v.networkPolicy.enabled (not $v.networkPolicy.console) -}}
{{- fail "console.ingress.host needs networkPolicy.console: your ingress controller" -}}
{{- end -}}
{{- end -}}
{{- with $v.autoscaling -}}
{{- if and (ne .type "none") (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas" -}}
{{- end -}}
{{- if eq .type "keda" -}}
{{- if not .keda.prometheus -}}
{{- fail "autoscaling.keda.prometheus is not set: KEDA asks it how many threads are needed" -}}
{{- end -}}
{{- if not $v.exporter.enabled -}}
{{- fail "autoscaling.type keda needs exporter.enabled: it serves imattr_threads_wanted" -}}
{{- end -}}
{{- if or (lt (int .keda.fallbackReplicas) (int .minReplicas)) (gt (int .keda.fallbackReplicas) (int .maxReplicas)) -}}
{{- fail "autoscaling.keda.fallbackReplicas is not between minReplicas and maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
