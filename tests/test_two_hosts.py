"""Two nodes: network namespaces of one machine, each with a host name, an address and a hosts file of its own.

What can be had without root, two nodes that meet over the loopback, is among the launchers of test_launch.py.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import BIN, CPU, HOSTFILE, ZERO3, Result, call, check_seen, nodes, result, write_recipe
from tests.processes import free_port

pytestmark = pytest.mark.slow
# In a namespace of mounts and names of its own, so that nothing outside changes: a hosts file, a name, the command.
ENTER = 'mount --bind "$1" /etc/hosts && echo "$2" > /proc/sys/kernel/hostname && shift 2 && exec "$@"'
ENVIRON = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    """What comes before a command that shall run on node-0, and on node-1."""
    names = [f"fusion-{os.getpid()}-{node}" for node in (0, 1)]
    try:
        ip("netns", "add", names[0])
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    ip("netns", "add", names[1])
    ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
    for node, name in enumerate(names):
        ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            ip("-n", name, "link", "set", interface, "up")
    file = tmp_path_factory.mktemp("etc") / "hosts"
    file.write_text("127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n")
    enter = ["unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh", str(file)]
    yield [["ip", "netns", "exec", name, *enter, f"node-{node}"] for node, name in enumerate(names)]
    for name in names:
        ip("netns", "delete", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both nodes see: the recipe, the hostfile, the outputs."""
    made = write_recipe(tmp_path_factory.mktemp("shared"))
    (made / HOSTFILE).write_text("node-0 slots=1\nnode-1 slots=1\n")
    return made


@pytest.fixture(scope="module")
def one_node(folder: Path) -> Result:
    """Two processes on one node."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "fusion.run", "small.yaml"]
    call([[*command, "--out", "of-one-node", *ZERO3, *CPU]], folder, {"DS_ACCELERATOR": "cpu"})
    return result(folder, "of-one-node")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "accelerate"])
def test_two_nodes_give_the_bits_of_one_by_zero3(launcher, hosts, folder, one_node):
    port, out = str(free_port()), f"of-{launcher}"
    after = ["fusion.run", "small.yaml", "--out", out, *([] if launcher == "accelerate" else ZERO3), *CPU]
    command = [word.replace("FIRST", "node-0").replace("PORT", port) for word in [*nodes(launcher), *after]]
    both = [[*hosts[node], *(word.replace("NODE", str(node)) for word in command)] for node in (0, 1)]
    said = call(both, folder, ENVIRON)
    assert said.count("tuned: done in") == 1, "one process of both nodes speaks"
    two = result(folder, out)
    check_seen(two.seen, one_node.seen)
    assert two.digest == one_node.digest and two.recorded == one_node.recorded
