"""Checks the workflows of GitHub: their schema, and with zizmor what an attacker could use. It runs no workflow.

    python workflows.py

The Python that runs it must have the packages of workflows.requirements.txt.
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


def succeed(program, *arguments):
    command = [PROGRAMS / program, *arguments]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert output.returncode == 0, f"{program} must find nothing:\n{output.stdout}{output.stderr}"


def the_workflows_match_their_schema():
    succeed("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))


def the_updates_match_their_schema():
    succeed("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")


def zizmor_finds_nothing():
    succeed("zizmor", "--offline", "--no-progress", "--strict-collection", "--persona", "pedantic", ".github")


def each_action_is_pinned_to_a_commit_and_names_its_version():
    for workflow in WORKFLOWS:
        for line in re.findall(r"uses: (.*)", workflow.read_text()):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), f"{workflow.name}: {line}"


def the_files_of_a_step_exist():
    for workflow in WORKFLOWS:
        for path in re.findall(r"(?<![\w/$.-])(?:deploy|tests|\.ci)/[\w./-]+", workflow.read_text()):
            assert (ROOT / path).exists(), f"{workflow.name} names {path}, which does not exist"


def the_targets_of_a_step_exist():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for workflow in WORKFLOWS:
        named = set(re.findall(r"^[^#\n]*\bmake ([\w-]+)", workflow.read_text(), re.MULTILINE))
        assert named <= targets, f"{workflow.name} names targets that the Makefile does not have: {named - targets}"


CHECKS = [
    the_workflows_match_their_schema,
    the_updates_match_their_schema,
    zizmor_finds_nothing,
    each_action_is_pinned_to_a_commit_and_names_its_version,
    the_files_of_a_step_exist,
    the_targets_of_a_step_exist,
]

if __name__ == "__main__":
    assert WORKFLOWS, "there must be workflows"
    report.run(CHECKS)
