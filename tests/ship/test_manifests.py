"""Tests the Dockerfiles, the compose files and the Kubernetes manifests: they match their schemas and contain the
current versions, their parts refer to each other, their containers are restricted, and Keychoir and HAProxy accept
their settings. hadolint checks the Dockerfiles. Also tests the order of the sidecar and the app, the health check, and
that git ignores the folder of the secrets."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import CLIENT_TOKEN, KEYS, PROGRAM, ROOT, needs, run

TOOLS = pathlib.Path(sys.executable).parent
DEPLOY = ROOT / "deploy"
COMPOSE_FILES = [DEPLOY / "compose.yaml", DEPLOY / "compose.redis.yaml"]
KUBERNETES_FILES = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
# Kinds whose schemas Kubernetes does not define. Their fields are checked below.
OTHER_KINDS = {"Kustomization", "ServiceMonitor"}
KUSTOMIZATION_FIELDS = {"apiVersion", "kind", "namespace", "resources", "images"}
# The image of the services and containers that run Keychoir.
IMAGE = "keychoir"
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]


def load(path):
    """Returns the document in a YAML file."""
    return yaml.safe_load(path.read_text())


def last_stage(name):
    """Returns the last stage of a Dockerfile."""
    return (ROOT / name).read_text().split("\nFROM scratch\n")[1]


def kustomize(folder):
    """Returns the documents that the kustomization of a folder lists, including those of listed folders, without its
    changes."""
    documents = []
    for name in load(folder / "kustomization.yaml")["resources"]:
        path = folder / name
        documents += kustomize(path) if path.is_dir() else [load(path)]
    return documents


def find_document(documents, kind):
    """Returns the only document of a kind."""
    (document,) = [document for document in documents if document["kind"] == kind]
    return document


def pod_containers(deployment):
    """Returns the containers of the pods of a deployment, including the sidecars."""
    pod = deployment["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def keychoir_container(deployment):
    """Returns the container that runs Keychoir."""
    (container,) = [container for container in pod_containers(deployment) if container["image"] == IMAGE]
    return container


def has_labels(labels, selector):
    """Returns whether a selector selects an object with these labels."""
    return all(labels.get(name) == value for name, value in selector["matchLabels"].items())


def test_hadolint_has_no_findings():
    run(TOOLS / "hadolint", "--failure-threshold", "style", ROOT / "Dockerfile", ROOT / "Dockerfile.prebuilt")


def test_both_images_have_the_same_settings():
    def settings(name):
        lines = last_stage(name).splitlines()
        return [line for line in lines if not line.startswith(("COPY", "ARG PROGRAM"))]

    assert settings("Dockerfile") == settings("Dockerfile.prebuilt")


def test_the_image_is_built_with_the_pinned_toolchain():
    channel = re.search(r'channel = "(.*)"', (ROOT / "rust-toolchain.toml").read_text())[1]
    base = re.search(r"^FROM (\S+) AS build$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert base.startswith(f"rust:{channel}-"), f"the base image must have Rust {channel}, and is {base}"


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_a_compose_file_matches_its_schema(path):
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


@pytest.mark.parametrize("path", KUBERNETES_FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_a_manifest_matches_its_schema(path):
    if load(path)["kind"] in OTHER_KINDS:
        return
    validation = run(TOOLS / "kubernetes-validate", "--strict", path)
    report = validation.stdout + validation.stderr
    assert "passed for resource" in report, f"the manifest must be validated: {report}"


def test_every_manifest_belongs_to_a_kustomization():
    for folder in {path.parent for path in KUBERNETES_FILES}:
        kustomization = load(folder / "kustomization.yaml")
        assert set(kustomization) <= KUSTOMIZATION_FIELDS
        assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
        names = {name for name in kustomization["resources"] if not (folder / name).is_dir()}
        manifests = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert names == manifests, f"the kustomization of {folder} must list all manifests of the folder"
        for image in kustomization.get("images", []):
            assert image == {"name": IMAGE, "newTag": VERSION}


def test_the_compose_files_use_the_image_of_the_package_version():
    for path in COMPOSE_FILES:
        images = [service["image"] for service in load(path)["services"].values()]
        assert f"{IMAGE}:{VERSION}" in images, f"{path.name} must use the version of Cargo.toml"


def test_the_manifests_of_the_pool_refer_to_each_other():
    documents = kustomize(DEPLOY / "kubernetes/pool")
    kinds = "Namespace Deployment Service PodDisruptionBudget NetworkPolicy Secret ServiceMonitor".split()
    assert sorted(document["kind"] for document in documents) == sorted(kinds)
    deployment, service = find_document(documents, "Deployment"), find_document(documents, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert has_labels(labels, deployment["spec"]["selector"])
    assert has_labels(labels, {"matchLabels": service["spec"]["selector"]})
    assert has_labels(labels, find_document(documents, "PodDisruptionBudget")["spec"]["selector"])
    policy = find_document(documents, "NetworkPolicy")["spec"]
    assert has_labels(labels, policy["podSelector"])
    container = keychoir_container(deployment)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (port,) = service["spec"]["ports"]
    assert ports[port["targetPort"]] == 11011 and ports[policy["ingress"][0]["ports"][0]["port"]] == 11011
    monitor = find_document(documents, "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert has_labels(service["metadata"]["labels"], monitor["spec"]["selector"])
    assert monitor["spec"]["endpoints"][0]["port"] == port["name"]
    # A drained node must be able to evict a pod.
    assert find_document(documents, "PodDisruptionBudget")["spec"]["minAvailable"] < deployment["spec"]["replicas"]


@pytest.mark.parametrize("name", ["pool", "sidecar"])
def test_the_secret_of_a_pod_contains_the_files_of_its_settings(name):
    documents = kustomize(DEPLOY / "kubernetes" / name)
    deployment, secret = find_document(documents, "Deployment"), find_document(documents, "Secret")
    (volume,) = [volume for volume in deployment["spec"]["template"]["spec"]["volumes"] if "secret" in volume]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    container = keychoir_container(deployment)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    files = [variable["value"] for variable in container["env"] if variable["name"].endswith("_FILE")]
    assert files and {f"{mounts[volume['name']]}/{name}" for name in secret["stringData"]} == set(files)


@pytest.mark.parametrize("name", ["pool", "sidecar"])
def test_every_container_is_restricted(name):
    deployment = find_document(kustomize(DEPLOY / "kubernetes" / name), "Deployment")
    pod = deployment["spec"]["template"]["spec"]["securityContext"]
    assert pod["runAsNonRoot"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["runAsUser"] == pod["fsGroup"] == 65532
    for container in pod_containers(deployment):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
    assert keychoir_container(deployment)["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_sidecar_starts_before_the_app_and_ends_after_it():
    deployment = find_document(kustomize(DEPLOY / "kubernetes/sidecar"), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (sidecar,) = pod["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    for probe in ["startupProbe", "readinessProbe"]:
        # HTTP probes of the kubelet do not reach the loopback address of a pod, so the probes run a command.
        assert sidecar[probe]["exec"]["command"][:2] == ["/keychoir", "healthcheck"]
    variables = {variable["name"]: variable["value"] for variable in sidecar["env"]}
    assert variables["KEYCHOIR_SERVER__LISTEN"].startswith("127.0.0.1:")
    app = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert app["ELEVENLABS_BASE_URL"] == f"http://{variables['KEYCHOIR_SERVER__LISTEN']}"


def keychoir_settings():
    """Yields the settings of each Keychoir in the compose files and manifests, as a parameter of a test."""
    for path in COMPOSE_FILES:
        for name, service in load(path)["services"].items():
            if service["image"].startswith(f"{IMAGE}:"):
                yield pytest.param(service["environment"], id=f"{path.name}-{name}")
    for name in ["pool", "sidecar"]:
        container = keychoir_container(find_document(kustomize(DEPLOY / "kubernetes" / name), "Deployment"))
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        yield pytest.param(variables, id=f"kubernetes-{name}")


@pytest.mark.parametrize("settings", list(keychoir_settings()))
def test_keychoir_accepts_the_settings(settings, tmp_path):
    files = {
        "elevenlabs_api_keys": "\n".join(KEYS),
        "client_token": CLIENT_TOKEN,
        "admin_token": "kca_token_of_the_operators",
        "redis_url": "redis://redis:6379",
    }
    for name, text in files.items():
        for folder in [tmp_path, tmp_path / "keychoir"]:
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
    image = dict(re.findall(r"^\s+(\w+)=(\S+)", last_stage("Dockerfile").split("\nENV ")[1], re.MULTILINE))
    image["KEYCHOIR_SERVER__LISTEN"] = re.search(r"KEYCHOIR_SERVER__LISTEN=(\S+)", last_stage("Dockerfile"))[1]
    environment = {
        name: value.replace("/run/secrets", str(tmp_path)).replace("/var/lib/keychoir", str(tmp_path))
        for name, value in {**image, **settings}.items()
    }
    # The port may be in use on this machine.
    environment["KEYCHOIR_SERVER__LISTEN"] = environment["KEYCHOIR_SERVER__LISTEN"].replace(":11011", ":0")
    run(*PROGRAM, "check", environment=environment)


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_every_service_of_a_compose_file_is_restricted(path):
    document = load(path)
    for name, service in document["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], f"the service {name} must be restricted"
        assert service["security_opt"] == ["no-new-privileges:true"], f"the service {name} must get no privileges"
        if service["image"].startswith(f"{IMAGE}:"):
            files = [value for key, value in service["environment"].items() if key.endswith("_FILE")]
            assert set(files) == {f"/run/secrets/{secret}" for secret in service["secrets"]}
    for secret in document["secrets"].values():
        assert secret["file"].startswith("./secrets/")


def test_the_compose_file_has_the_health_check_of_the_image():
    check = load(COMPOSE_FILES[0])["services"]["keychoir"]["healthcheck"]["test"]
    assert f"CMD {check[1:]}".replace("'", '"') in last_stage("Dockerfile")


@needs(shutil.which("haproxy"), "haproxy")
def test_haproxy_accepts_the_settings_of_the_compose_file():
    document = load(COMPOSE_FILES[1])
    balancer = document["services"]["balancer"]
    (source,) = [volume.split(":")[0] for volume in balancer["volumes"]]
    variables = balancer["environment"]
    replicas = {variables["KEYCHOIR_REPLICA_ONE"], variables["KEYCHOIR_REPLICA_TWO"]}
    assert replicas == {f"{name}:11011" for name in document["services"] if name in balancer["depends_on"]}
    # This machine does not know the names of the services.
    known = {name: re.sub(r"^\w+:", "127.0.0.1:", value) for name, value in variables.items()}
    run("haproxy", "-c", "-f", DEPLOY / source, environment=known)


def test_the_folder_of_the_secrets_is_ignored_by_git():
    ignored = subprocess.run(
        ["git", "check-ignore", "--quiet", "deploy/secrets/client_token"], cwd=ROOT, env=dict(os.environ), check=False
    )
    assert ignored.returncode == 0
