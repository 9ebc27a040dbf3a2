"""Checks the GitHub workflows and the settings of Dependabot without running them: their schemas, the weaknesses that
zizmor finds, the pinned commits of actions, and the files and Makefile targets that the steps use.

    python workflows.py

The script needs the packages of `workflows.requirements.txt`. The exit code is 1 if a check fails (`report.py`).
"""

import pathlib
import re
import subprocess
import sys

import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROGRAMS = pathlib.Path(sys.executable).parent
TIMEOUT_SECONDS = 120


def run_successfully(program, *arguments):
    """Runs a program of the Python environment, which must succeed."""
    command = [PROGRAMS / program, *arguments]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert completed.returncode == 0, f"{program} must find no problems:\n{completed.stdout}{completed.stderr}"


def the_workflows_match_their_schema():
    run_successfully("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))


def the_dependabot_settings_match_their_schema():
    run_successfully("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")


def zizmor_finds_no_weaknesses():
    run_successfully("zizmor", "--offline", "--no-progress", "--strict-collection", "--persona", "pedantic", ".github")


def each_action_is_pinned_to_a_commit_and_names_its_version():
    for workflow in WORKFLOWS:
        for line in re.findall(r"uses: (.*)", workflow.read_text()):
            is_pinned = re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
            assert is_pinned, f"{workflow.name} must pin {line} to a commit, with its version in a comment"


def the_files_of_all_steps_exist():
    for workflow in WORKFLOWS:
        for path in re.findall(r"(?<![\w/$.-])(?:deploy|tests|\.ci)/[\w./-]+", workflow.read_text()):
            assert (ROOT / path).exists(), f"{workflow.name} names {path}, which does not exist"


def the_targets_of_all_steps_exist():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for workflow in WORKFLOWS:
        used_targets = set(re.findall(r"^[^#\n]*\bmake ([\w-]+)", workflow.read_text(), re.MULTILINE))
        assert used_targets <= targets, f"{workflow.name} uses unknown targets of the Makefile: {used_targets - targets}"


CHECKS = [
    the_workflows_match_their_schema,
    the_dependabot_settings_match_their_schema,
    zizmor_finds_no_weaknesses,
    each_action_is_pinned_to_a_commit_and_names_its_version,
    the_files_of_all_steps_exist,
    the_targets_of_all_steps_exist,
]

if __name__ == "__main__":
    assert WORKFLOWS, "there must be workflows"
    report.run_checks(CHECKS)
