"""Checks installed packages for known vulnerabilities in PyPI's database, with pip-audit.

    python scripts/audit.py         # `make audit` first creates an environment for it

The exit status is 1 if there are known vulnerabilities. If PyPI cannot be reached it is 0, and the last line says that
nothing was audited; pip-audit itself would silently pass.
"""

import json
import subprocess
import sys
from typing import Any


COMMAND = ["-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable", "--timeout", "15"]
LIMIT = 300  # seconds


def main() -> int:
    try:
        done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, timeout=LIMIT)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"NOT AUDITED: PyPI's advisories did not respond within {LIMIT} s.")
        return 0
    except ValueError:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"NOT AUDITED: PyPI's advisories could not be queried: {last_line}")
        return 0
    return report(packages)


def report(packages: list[dict[str, Any]]) -> int:
    skipped = [package for package in packages if "skip_reason" in package]
    audited = [package for package in packages if "skip_reason" not in package]
    for package in skipped if audited else skipped[:1]:
        print(f"not audited: {package['name']}: {package['skip_reason']}")
    vulnerable = [package for package in audited if package["vulns"]]
    for package in vulnerable:
        for found in package["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version"
            print(f"VULNERABLE: {package['name']} {package['version']}: {found['id']}; fixed in {fixed}")
    if not audited:
        print(f"NOT AUDITED: PyPI's advisories were not reached; none of {len(packages)} packages was looked up.")
        return 0
    print(f"{len(audited)} packages audited, {len(skipped)} not, {len(vulnerable)} with known vulnerabilities.")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
