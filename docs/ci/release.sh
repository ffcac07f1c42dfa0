#!/usr/bin/env bash
# Averages checkpoints for a release: gate, report, verification, attestation, signature.
#
# Environment:
#   SOURCES       run folder or checkpoints, one a line
#   OUTPUT        swa.safetensors, or a folder: release/
#   OPTIONS       options of `ckpt-avg average`, one a line: --last=8 (optional)
#   SIGNING_KEY   file with a private EC key in PEM (optional: without it, nothing is signed)
#
# Writes OUTPUT, and next to it: NAME.report.html and NAME.report.json, also if a requirement is not met; NAME.intoto.json,
# the attestation; and with a key NAME.intoto.dsse.json, the signed attestation, and NAME.sig, the signature of the weights.
# In a GitHub job it also sets outputs and writes the job's summary.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

case "$OUTPUT" in '' | *$'\n'*) echo "OUTPUT must be one path" >&2 && exit 2 ;; esac
name=${OUTPUT%/}
if [ -n "${SIGNING_KEY-}" ] && ! command -v model_signing >/dev/null; then
    echo "model_signing: no such command. Install it: pip install model-signing pyopenssl" >&2
    exit 2
fi

lines() { grep -v '^[[:space:]]*$' <<<"$1" || true; }
output() { [ -z "${GITHUB_OUTPUT-}" ] || printf '%s=%s\n' "$1" "$2" >>"$GITHUB_OUTPUT"; }
mapfile -t sources < <(lines "$SOURCES")
mapfile -t options < <(lines "${OPTIONS-}")

code=0
printed=$(ckpt-avg average "${options[@]}" --sha256 --report "$name.report.html" --report "$name.report.json" \
    -o "$OUTPUT" -- "${sources[@]}") || code=$?
printf '%s\n' "$printed"
# Four spaces make a code block of any text.
[ -z "${GITHUB_STEP_SUMMARY-}" ] || { sed 's/^/    /' <<<"$printed" && echo; } >>"$GITHUB_STEP_SUMMARY"
[ ! -e "$name.report.html" ] || output report "$name.report.html"
[ "$code" = 0 ] || exit "$code" # 9: a requirement is not met

# Weights that fail from here on must not be taken for released ones.
trap '[ "$?" = 0 ] || mv "$name" "$name.unreleased"' EXIT
verified=$(ckpt-avg verify --json --sources -- "$OUTPUT" "${sources[@]}")
python "$here/attest.py" statement "$OUTPUT" <(printf '%s' "$verified") "$name.report.json" >"$name.intoto.json"
output statement "$name.intoto.json"
if [ -n "${SIGNING_KEY-}" ]; then
    python "$here/attest.py" sign "$name.intoto.json" "$SIGNING_KEY" >"$name.intoto.dsse.json"
    model_signing sign key "$OUTPUT" --private_key "$SIGNING_KEY" --signature "$name.sig"
    output attestation "$name.intoto.dsse.json"
    output signature "$name.sig"
fi
if [ -d "$OUTPUT" ]; then sums="$name/SHA256SUMS"; else sums="$OUTPUT"; fi
output digest "$(sha256sum <"$sums" | cut -d ' ' -f 1)"
output path "$OUTPUT"
