"""README, templates, workflow and container files agree with the repository."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted(p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CONTAINERS = sorted(ROOT / "launch/containers" / name for name in ("Dockerfile", "apptainer.def"))


def copied(container: Path) -> dict[str, str]:
    """Paths of the repository that go into an image, with where they end up."""
    text = container.read_text()
    if container.name == "Dockerfile":
        lines = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY ")]
        return {source: line[-1] for line in lines for source in line[:-1]}
    section = text.partition("%files\n")[2].partition("\n%")[0]
    return dict(line.split() for line in section.splitlines() if line.strip())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert re.match(r"https://", link) or (ROOT / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("form", FORMS, ids=lambda p: p.stem)
def test_an_issue_form_has_what_the_platform_needs(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"]
    assert content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_actions_are_pinned_and_commands_name_files_that_exist(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        for script in re.findall(r"\S+\.sh\b", step.get("run", "")):
            assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda p: p.name)
def test_a_container_copies_existing_files_and_all_that_is_installed(container):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = copied(container)
    assert all((ROOT / source).exists() for source in sources)
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *(Path(path).parts[0] for path in wheel.get("force-include", ()))}
    assert needed <= set(sources)
    extras = re.search(r"\.\[([\w,]+)\]", container.read_text())[1].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])


def test_both_containers_copy_the_same_and_docker_may_read_it():
    first, second = (set(copied(container)) for container in CONTAINERS)
    assert first == second
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert first <= {line[1:] for line in ignored if line.startswith("!")}


def test_no_image_runs_as_root():
    users = re.findall(r"^USER (\S+)", (ROOT / "launch/containers/Dockerfile").read_text(), re.MULTILINE)
    assert users
    assert users[-1].partition(":")[0] not in ("root", "0")


def test_nothing_is_committed_that_git_ignores():
    listed = ["git", "-C", str(ROOT), "ls-files"]
    if subprocess.run(listed, capture_output=True, check=False).returncode:
        pytest.skip("not a Git repository")
    ignored = subprocess.run([*listed, "-ci", "--exclude-standard"], capture_output=True, text=True, check=True)
    assert ignored.stdout.split() == []
    databases = subprocess.run([*listed, "*.db", "*.sqlite"], capture_output=True, text=True, check=True)
    assert databases.stdout.split() == []
