#!/usr/bin/env bash
# A user_config that is taken out of the file of `serve deploy` reaches no replica: they go on with the one before.
# Library: ray[serve] 2.60.0.
# Guess: reconfigure(None), or new replicas; the status says that the deployment is updated and healthy.
# Happens: nothing is called and nobody is replaced, unless reconfigure has a parameter named `rank`: then it is called
#   with None.
# Who meets it: deployments that take thresholds or model versions from user_config: after a rollback to a file without
#   one, old replicas and new ones (after a restart) answer differently. Take a `rank`, or write `user_config: {}`.
# Seen: without rank: [{"version": 1}]; with rank: [{"version": 1}, None]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet 'ray[serve]==2.60.0'

cat >"$dir/check.py" <<'PY'
import sys
import time

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


@serve.deployment
class Told:
    def __init__(self):
        self.told = []

    def reconfigure(self, user_config):
        self.told.append(user_config)

    def __call__(self):
        return self.told


@serve.deployment
class Ranked(Told.func_or_class):
    def reconfigure(self, user_config, rank=None):
        self.told.append(user_config)


told, ranked = Told.bind(), Ranked.bind()


def deploy(**config):
    apps = [
        {"name": name, "route_prefix": f"/{name}", "import_path": f"check:{name.lower()}",
         "deployments": [{"name": name} | config]}
        for name in ("Told", "Ranked")
    ]
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": apps}))


def seen(name):
    return serve.get_app_handle(name).remote().result(timeout_s=60)


def wait(happens):
    end = time.monotonic() + 90
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.1)


if __name__ == "__main__":
    env = {"env_vars": {"PYTHONPATH": sys.argv[2]}}
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
             _temp_dir=sys.argv[1], runtime_env=env)
    serve.start(http_options={"location": "NoServer"})
    deploy(user_config={"version": 1})
    wait(lambda: [app.status for app in serve.status().applications.values()] == ["RUNNING"] * 2)
    deploy()
    wait(lambda: seen("Ranked")[-1] is None)
    time.sleep(5)
    wait(lambda: [app.status for app in serve.status().applications.values()] == ["RUNNING"] * 2)
    print("without rank:", seen("Told"), "with rank:", seen("Ranked"))
    assert (seen("Told"), seen("Ranked")) == ([{"version": 1}], [{"version": 1}, None])
    serve.shutdown()
    ray.shutdown()
PY
export RAY_USAGE_STATS_ENABLED=0
"$dir/venv/bin/python" "$dir/check.py" "$dir/r" "$dir"
