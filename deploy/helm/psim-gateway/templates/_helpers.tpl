{{/* Names of 63 characters at most, with the longest ending, -egress-postgresql. */}}
{{- define "psim.name" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride }}
{{- else if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 45 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" (.Release.Name | trunc 32 | trimSuffix "-") .Chart.Name }}
{{- end -}}
{{- end -}}

{{/* The name is fixed: the rules of Prometheus ask for it as their job. */}}
{{- define "psim.selector" -}}
app.kubernetes.io/name: psim-gateway
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "psim.labels" -}}
{{ include "psim.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "psim.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{/* A policy that opens ways out: a dict of root, ending, to and ports. */}}
{{- define "psim.egress" -}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "psim.name" .root }}-{{ .ending }}
  labels: {{- include "psim.labels" .root | nindent 4 }}
spec:
  podSelector:
    matchLabels: {{- include "psim.selector" .root | nindent 6 }}
  policyTypes: [Egress]
  egress:
    - {{- if .to }}
      to: {{- toYaml .to | nindent 8 }}
      {{- end }}
      {{- if .ports }}
      ports:
        {{- range .ports }}
        - {protocol: TCP, port: {{ . }}}
        {{- end }}
      {{- end }}
{{ end -}}

{{/* A policy that opens ways in: a dict of root, ending, from and ports. */}}
{{- define "psim.ingress" -}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "psim.name" .root }}-{{ .ending }}
  labels: {{- include "psim.labels" .root | nindent 4 }}
spec:
  podSelector:
    matchLabels: {{- include "psim.selector" .root | nindent 6 }}
  policyTypes: [Ingress]
  ingress:
    - from: {{- toYaml .from | nindent 8 }}
      ports:
        {{- range .ports }}
        - {port: {{ . }}}
        {{- end }}
{{ end -}}

{{/* Variables of the gateway that are in no ConfigMap. */}}
{{- define "psim.env" -}}
{{- with .Values -}}
{{- if .keys.enabled }}
- {name: PSIM_KEYS, value: /keys/keys.toml}
{{- end }}
{{- if .bundleKey.enabled }}
- {name: PSIM_BUNDLE_KEY, value: /bundle-key/public.pem}
{{- end }}
{{- if or .models.list .models.secret }}
- {name: PSIM_MODELS, value: /models/models.toml}
{{- end }}
{{- if .audit.enabled }}
{{ include "psim.secret" (list "PSIM_AUDIT_URL" .audit.secret "url") }}
{{ include "psim.secret" (list "PSIM_AUDIT_KEY" .audit.secret "key") }}
{{- end }}
{{- if .limits.enabled }}
{{ include "psim.secret" (list "PSIM_LIMITS_URL" .limits.secret "url") }}
{{- end }}
{{- if .upstream.secret }}
{{ include "psim.secret" (list "PSIM_UPSTREAM_AUTHORIZATION" .upstream.secret "authorization") }}
{{- end }}
{{- with .extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* A variable, of a Secret and its key. */}}
{{- define "psim.secret" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef: {name: {{ index . 1 }}, key: {{ index . 2 }}}
{{- end -}}
