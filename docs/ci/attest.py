"""Makes, signs and verifies in-toto attestations of averages (docs/predicate-v1.md).

    python attest.py statement OUTPUT VERIFIED.json [REPORT.json] > OUTPUT.intoto.json
    python attest.py sign OUTPUT.intoto.json KEY.pem > OUTPUT.intoto.dsse.json
    python attest.py verify OUTPUT OUTPUT.intoto.dsse.json PUBLIC.pem

VERIFIED.json is what `ckpt-avg verify --json` prints, REPORT.json what `average --report` writes. The script needs
Python 3.10 and the command openssl.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:uuid:1c7da52d-027d-4994-b9bc-4310d6091498"  # an average, version 1
JSON_KEYS = ("sources", "options", "weighting", "batch_norm", "spectral_norm", "log", "origin")  # of the metadata
PAYLOAD_TYPE = "application/vnd.in-toto+json"


def statement(output: Path, verified: dict[str, Any], report: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the in-toto statement about an output: a file or a folder."""
    if report is not None and report["data_digest"] != verified["data_digest"]:
        refuse(f"{output}: the report is of another output")
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in digests(output).items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate(output, verified, report or {}),
    }


def predicate(output: Path, verified: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Returns what the weights record, what verify found, and what was measured."""
    record = {key.removeprefix("ckpt_avg."): value for key, value in verified["metadata"].items()}
    record |= {key: json.loads(record[key]) for key in JSON_KEYS if key in record}
    sources = record["sources"]
    if any("sha256" not in source for source in sources):
        refuse(f"{output}: the digests of its checkpoints are not recorded. Run average with --sha256.")
    inputs = [
        {
            "name": source["name"],
            "files": [{"name": name, "digest": {"sha256": digest}} for name, digest in source["sha256"].items()],
            "step": source.get("step"),
            "epoch": source.get("epoch"),
            "weight": source.get("weight", 1 / len(sources)),
            "metrics": source.get("metrics"),
        }
        for source in sources
    ]
    found = {
        "tool": {"name": "ckpt-avg", "version": record["version"]},
        "method": record["method"],
        "inputs": list(map(without_none, inputs)),
        "weighting": record.get("weighting"),
        "options": {**record["options"], "dtype": record["dtype"]},
        "batchNorm": record.get("batch_norm"),
        "spectralNorm": record.get("spectral_norm"),
        "log": record.get("log"),
        "split": record.get("split"),
        "origin": record.get("origin"),
        "dataDigest": record["data_digest"],
        "recomputed": verified["checkpoints"] is not None,
        "evaluations": [
            {key: each[key] for key in ("name", "refreshed", "metrics")} for each in report.get("evaluations", [])
        ],
        "requirements": report.get("requirements", []),
    }
    return without_none(found)


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries that have a value."""
    return {key: value for key, value in values.items() if value is not None}


def digests(output: Path) -> dict[str, str]:
    """Returns the SHA-256 of a file, or of every file of a folder."""
    paths = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    found = {}
    for path in paths:
        with path.open("rb") as file:
            name = path.relative_to(output).as_posix() if output.is_dir() else path.name
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            found[name] = digest.hexdigest()
    return found


def encoded(payload: bytes) -> bytes:
    """Returns the bytes that are signed: the pre-authentication encoding of DSSE."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def openssl(*arguments: str, given: bytes = b"") -> bytes | None:
    """Returns what openssl prints; None if it fails."""
    done = subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def sign(payload: bytes, key: str) -> dict[str, Any]:
    """Returns the DSSE envelope of a statement, signed with ECDSA and SHA-256."""
    signature = openssl("dgst", "-sha256", "-sign", key, given=encoded(payload))
    public = openssl("pkey", "-in", key, "-pubout", "-outform", "DER")
    if signature is None or public is None:
        refuse(f"{key}: no private key in PEM that openssl can sign with")
    signed = {"keyid": hashlib.sha256(public).hexdigest(), "sig": base64.b64encode(signature).decode()}
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [signed],
    }


def verify(output: Path, envelope: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the predicate, if the key signed it and it is about exactly these files."""
    payload = base64.b64decode(envelope["payload"], validate=True)
    signed = any(is_signed(payload, each["sig"], key) for each in envelope["signatures"])
    if envelope["payloadType"] != PAYLOAD_TYPE or not signed:
        refuse(f"{output}: the attestation is not signed with {key}")
    found = json.loads(payload)
    if (found["_type"], found["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        refuse(f"{output}: the attestation is of another kind: {found['predicateType']}")
    expected = {subject["name"]: subject["digest"]["sha256"] for subject in found["subject"]}
    if digests(output) != expected:
        changed = sorted(name for name, _ in digests(output).items() ^ expected.items())
        refuse(f"{output}: not the files of the attestation: {', '.join(dict.fromkeys(changed))}")
    return dict(found["predicate"])


def is_signed(payload: bytes, signature: str, key: str) -> bool:
    """Whether the key made the signature."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(base64.b64decode(signature, validate=True))
        file.flush()
        arguments = ("dgst", "-sha256", "-verify", key, "-signature", file.name)
        return openssl(*arguments, given=encoded(payload)) is not None


def refuse(message: str) -> NoReturn:
    """Ends with a message, and exit code 1."""
    raise SystemExit(f"Error: {message}")


def main(command: str, path: str, *others: str) -> None:
    """Runs a command line."""
    if command == "statement":
        printed: Any = statement(Path(path), *(json.loads(Path(other).read_text()) for other in others))
    elif command == "sign":
        printed = sign(Path(path).read_bytes(), others[0])
    elif command == "verify":
        found = verify(Path(path), json.loads(Path(others[0]).read_text()), others[1])
        print(f"{path}: signed, unchanged: {found['method']} of {len(found['inputs'])} checkpoints", file=sys.stderr)
        printed = found
    else:
        refuse(f"{command}: no such command. Use statement, sign or verify.")
    print(json.dumps(printed, indent=2))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
