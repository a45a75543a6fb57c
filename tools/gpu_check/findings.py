"""The findings of `polyshard doctor`, appended as lines of JSON to the file that is given."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from polyshard.cli.doctor import adapters, compiled_parts, kernels, platform_facts, show


def main() -> None:
    findings = [*platform_facts(), *adapters(), *kernels(), *compiled_parts()]
    with open(sys.argv[1], "a") as file:
        for finding in findings:
            file.write(json.dumps(asdict(finding)) + "\n")
    show(findings)


if __name__ == "__main__":
    main()
