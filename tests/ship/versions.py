"""Checks that the lock files, the latest release in the changelog, the documents and the manifests have the version of
Cargo.toml. The exit code is 1 if a check fails (`report.py`).

    python versions.py [TAG]

With the tag of a release, such as `v0.2.0`, the script also checks that it is the tag of this version.
"""

import datetime
import pathlib
import re
import subprocess
import sys
import tomllib

import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
LOCK_FILES = ["Cargo.lock", "fuzz/Cargo.lock"]
# Matches a version: `keychoir:0.2.0` of an image, `keychoir-0.2.0` and `keychoir_0.2.0` of a package, and `keychoir
# 0.2.0` and the tag `v0.2.0` in a text.
MENTION = re.compile(r"(?:\bkeychoir[:_ @-]v?|[\s`/(]v)(\d+\.\d+\.\d+)\b")
# Files that may contain versions of the past or of other programs.
FILES_WITH_OTHER_VERSIONS = ("CHANGELOG.md", "Cargo.lock", "benches/", "docs/adr/", ".github/", "tests/", "src/")


def the_lock_files_have_the_version():
    for name in LOCK_FILES:
        packages = tomllib.loads((ROOT / name).read_text())["package"]
        locked = [package["version"] for package in packages if package["name"] == "keychoir"]
        assert locked == [VERSION], f"{name} must have version {VERSION}, and has {locked}"


def the_changelog_begins_with_unreleased_changes_and_this_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased", f"the first section must be Unreleased, and is {headings[0]}"
    version, date = re.fullmatch(r"(\S+) \((\S+)\)", headings[1]).groups()
    assert version == VERSION, f"the latest release must be {VERSION}, and is {version}"
    datetime.date.fromisoformat(date)


def documents_and_manifests_contain_no_other_version():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in files:
        if not name or any(name.startswith(part) or name.endswith(part) for part in FILES_WITH_OTHER_VERSIONS):
            continue
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        for mention in MENTION.finditer(text):
            assert mention.group(1) == VERSION, f"{name} must contain no {mention.group(0).strip()}, but {VERSION}"


def the_tag_belongs_to_the_version():
    assert sys.argv[1] == f"v{VERSION}", f"the tag must be v{VERSION}, and is {sys.argv[1]}"


CHECKS = [
    the_lock_files_have_the_version,
    the_changelog_begins_with_unreleased_changes_and_this_version,
    documents_and_manifests_contain_no_other_version,
]

if __name__ == "__main__":
    report.run_checks(CHECKS + [the_tag_belongs_to_the_version] * (len(sys.argv) > 1))
