"""`neuron-ls -j` of a machine's shared directory: its chips, and the processes that hold their cores."""

import fcntl
import json
import sys
from pathlib import Path
from typing import Any


def processes(root: Path, cores: range) -> list[dict[str, Any]]:
    pids = set()
    (root / "locks").mkdir(exist_ok=True)
    with open(root / "locks" / "all", "a") as everything:
        fcntl.flock(everything, fcntl.LOCK_EX)  # nobody takes cores while we try them
        for path in [root / "locks" / f"nc{core}" for core in cores]:
            with open(path, "a+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    pids.add(int(file.read()))
    return [{"pid": pid, "command": command(pid), "neuron_runtime_version": "2.0"} for pid in sorted(pids)]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def devices(root: Path) -> list[dict[str, Any]]:
    config = json.loads((root / "machine.json").read_text())
    size = config["cores_per_chip"]
    return [
        {
            "neuron_device": chip,
            "bdf": f"00:{chip + 16:02x}.0",
            "cpu_affinity": "0-1",
            "numa_node": "0",
            "connected_to": None,
            "nc_count": size // config["lnc"],
            "logical_neuroncore_config": config["lnc"],
            "memory_size": config["memory"] * size // config["lnc"],
            "neuroncore_ids": list(range(chip * size // config["lnc"], (chip + 1) * size // config["lnc"])),
            "neuron_processes": processes(root, range(chip * size, (chip + 1) * size)),
        }
        for chip in range(config["cores"] // size)
    ]


if __name__ == "__main__":
    if not {"-j", "--json-output"} & set(sys.argv[2:]):
        sys.exit("the double prints JSON only: neuron-ls -j")
    print(json.dumps(devices(Path(sys.argv[1]))))
