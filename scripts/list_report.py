"""Write the JSON schema of report.json to docs/report.schema.json: `python scripts/list_report.py`."""

from pathlib import Path

from bitpress.checkpoints.jsonfile import write_json_bytes
from bitpress.report.document import report_schema

TARGET = Path(__file__).resolve().parents[1] / "docs" / "report.schema.json"


def main() -> None:
    TARGET.write_bytes(write_json_bytes(report_schema()))


if __name__ == "__main__":
    main()
