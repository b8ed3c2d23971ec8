"""Scripts that start runs: what they say, that shells and YAML readers take them, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from castalia.cli import main as cli
from castalia.launch.hosts import Host, read_hosts

HOSTS = "# ours\nnode1 slots=8\nnode2 slots=8 # spare\n\nnode3 slots = 4\n"
LAYOUT = ["gpt-neox-20b", "parallel.tp=2", "parallel.pp=4", "parallel.gpus=null", "train.batch_size=1536"]


@pytest.fixture
def launch(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["castalia", "launch", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def script(launch):
    def text(*words: str) -> str:
        code, out, err = launch(*words)
        assert code == 0, err
        return out

    return text


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return path


def ran(text: str, folder, **variables: str) -> list[list[str]]:
    """The command lines that a script hands to torchrun, with stand-ins for ssh, srun and torchrun."""
    stand_ins = {
        "torchrun": '#!/bin/bash\nprintf "%s\\0" "$@" > "$LOG.$$"\n',
        "srun": '#!/bin/bash\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n',
        "ssh": '#!/bin/bash\nshift\nexec bash -c "$*"\n',
        "scontrol": "#!/bin/bash\nprintf 'node7\\nnode8\\n'\n",
    }
    for name, content in stand_ins.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log"), **variables}
    subprocess.run(["bash", "-c", text], env=environment, cwd=folder, check=True, timeout=30)
    return [path.read_text().split("\0")[:-1] for path in folder.glob("log.*")]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_slurm_starts_torchrun_once_on_each_node_and_the_first_is_the_host(script, tmp_path):
    text = script("slurm", *LAYOUT, "train.steps=5", "--nodes", "12", "--gpus-per-node", "8", "--max-restarts", "2")
    assert "castalia plan CONFIG --gpus 96xDEVICE" in text
    assert "# 96 ranks on 12 nodes: PP 4 x DP 12 x TP 2" in text
    for line in ("--nodes=12", "--ntasks-per-node=1", "--gpus-per-node=8", "--job-name=gpt-neox-20b"):
        assert f"\n#SBATCH {line}\n" in text
    commands = ran(text, tmp_path, SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[7-8]")
    assert sorted(value(command, "--rdzv-conf") for command in commands) == ["is_host=false", "is_host=true"]
    for command in commands:
        assert value(command, "--nnodes") == "12" and value(command, "--nproc-per-node") == "8"
        assert value(command, "--rdzv-id") == "42" and value(command, "--rdzv-endpoint") == "node7:29500"
        assert value(command, "--max-restarts") == "2"
        assert command[command.index("-m") :] == ["-m", "castalia", "train", *LAYOUT, "train.steps=5"]


def test_words_with_spaces_and_quotes_reach_every_node_as_they_are(script, hostfile, tmp_path):
    for kind, given in (
        ("slurm", ["--nodes", "2", "--gpus-per-node", "8"]),
        ("torchrun", ["--hostfile", str(hostfile)]),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        config = ["pythia-14m", "train.batch_size=1280", "parallel.tp=2", 'tokenizer.path="it\'s $HOME & more"']
        for command in ran(script(kind, *config, *given), folder, SLURM_JOB_ID="1", SLURM_JOB_NODELIST="x"):
            assert command[-1] == config[-1]


def test_torchrun_has_a_line_for_each_host_with_its_slots(script, hostfile, tmp_path):
    text = script("torchrun", "pythia-14m", "train.batch_size=640", "--hostfile", str(hostfile))
    assert "# 20 ranks on 3 nodes" in text
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("ssh ")]
    assert [line[1] for line in lines] == ["node1", "node2", "node3"]
    commands = ran(text, tmp_path)
    assert sorted(value(command, "--nproc-per-node") for command in commands) == ["4", "8", "8"]
    assert {value(command, "--rdzv-endpoint") for command in commands} == {"node1:29500"}
    assert sorted(value(command, "--rdzv-conf") for command in commands) == ["is_host=false"] * 2 + ["is_host=true"]


def test_processes_have_time_to_save_when_they_are_told_to_stop(script, hostfile):
    run = ["pythia-14m", "train.batch_size=512"]
    slurm = script("slurm", *run, "--nodes", "2", "--gpus-per-node", "8")
    one = script("torchrun", *run, "--gpus-per-node", "8")
    many = script("torchrun", "pythia-14m", "train.batch_size=640", "--hostfile", str(hostfile))
    for text in (slurm, one, many):
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120" in text
    assert "\n#SBATCH --signal=TERM@300\n" in slurm
    _, job = yaml.safe_load_all(script("k8s", *run, "--gpus-per-node", "8"))
    pod = job["spec"]["template"]["spec"]
    assert {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "120"} in pod["containers"][0]["env"]
    assert pod["terminationGracePeriodSeconds"] == 150


def test_torchrun_on_one_machine_needs_no_host(script, tmp_path):
    text = script("torchrun", "pythia-14m", "train.batch_size=256", "--gpus-per-node", "8")
    (command,) = ran(text, tmp_path)
    assert command[:3] == ["--standalone", "--nproc-per-node", "8"] and command[-3] == "train"


def test_the_hostfile_can_be_used_in_part(script, hostfile):
    text = script(
        *("slurm", "pythia-14m", "train.batch_size=256", "--hostfile", str(hostfile)),
        *("--nodes", "2", "--gpus-per-node", "4"),
    )
    assert "#SBATCH --nodelist=node1,node2\n" in text and "# 8 ranks on 2 nodes" in text


def test_kubernetes_reads_a_service_and_an_indexed_job(script, tmp_path):
    text = script("k8s", *LAYOUT, "--nodes", "12", "--gpus-per-node", "8", "--name", "My run_1", "--image", "here/it:2")
    service, job = yaml.safe_load_all(text)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 12 and spec["completionMode"] == "Indexed"
    assert service["metadata"]["name"] == job["metadata"]["name"] == pod["subdomain"] == "my-run-1"
    assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    container = pod["containers"][0]
    assert container["image"] == "here/it:2" and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    inside = shlex.join(container["command"])
    for index, host in (("0", "true"), ("5", "false")):
        folder = tmp_path / index
        folder.mkdir()
        (command,) = ran(inside, folder, JOB_COMPLETION_INDEX=index, JOB_UID="u")
        assert value(command, "--rdzv-endpoint") == "my-run-1-0.my-run-1:29500"
        assert value(command, "--rdzv-conf") == f"is_host={host}"
        assert command[-len(LAYOUT) :] == LAYOUT


def test_output_is_written_to_a_file(script, tmp_path):
    options = ["torchrun", "pythia-14m", "train.batch_size=256", "--gpus-per-node", "2"]
    written = tmp_path / "go.sh"
    assert script(*options, "--output", str(written)) == f"wrote {written}; start it with: bash {written}\n"
    assert written.read_text() == script(*options)
    assert [path.name for path in tmp_path.iterdir()] == ["go.sh"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["slurm", "gpt-neox-20b", "parallel.gpus=null", "--nodes", "3", "--gpus-per-node", "7"],
            "multiple of 8; start 16 or 24",
        ),
        (["slurm", "pythia-14m", "parallel.tp=3", "--gpus-per-node", "3"], "parallel.tp=3 does not divide"),
        (["slurm", "pythia-14m", "train.batch_size=10", "--gpus-per-node", "4"], "train.batch_size=10 does not divide"),
        (["torchrun", "pythia-14m", "--nodes", "2", "--gpus-per-node", "4"], "give --hostfile"),
        (["torchrun", "a.yml", "--nodes", "2", "--gpus-per-node", "4"], "FIRST:29500 -m castalia train a.yml"),
        (["slurm", "pythia-14m"], "Give --gpus-per-node"),
        (["slurm", "pythia-14m", "--hostfile", "HOSTS"], "different slots"),
        (["slurm", "pythia-14m", "--hostfile", "HOSTS", "--nodes", "4"], "more than the 3 hosts"),
        (["slurm", "pythia-14m", "--hostfile", "HOSTS", "--gpus-per-node", "8"], "node3 has 4 slots"),
        (["k8s", "pythia-14m", "--hostfile", "HOSTS", "--nodes", "2"], "k8s chooses the machines itself"),
    ],
)
def test_what_cannot_run_is_refused_with_a_reason(launch, hostfile, words, reason):
    code, out, err = launch(*[word.replace("HOSTS", str(hostfile)) for word in words])
    assert (code, out) == (2, "") and reason in err and err.count("error:") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("node1 slots=0\n", ":1: "),
        ("a slots=1\n\nb\n", ":3: "),
        ("a slots=1\na slots=2\n", "twice"),
        ("#\n", "no host"),
    ],
)
def test_broken_hostfiles_are_refused(tmp_path, text, reason):
    from castalia.errors import ConfigError

    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_hosts(tmp_path / "hosts")


def test_hostfiles_are_read(hostfile):
    assert read_hosts(hostfile) == [Host("node1", 8), Host("node2", 8), Host("node3", 4)]


def test_json_has_the_script_and_what_stands_in_the_way(launch, script, tmp_path):
    words = ["slurm", *LAYOUT, "--nodes", "12", "--gpus-per-node", "8"]
    plain = script(*words)
    code, out, err = launch(*words, "--json", "--output", str(tmp_path / "job.sh"))
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["script"] == plain == (tmp_path / "job.sh").read_text()
    assert found["start"] == f"sbatch {tmp_path / 'job.sh'}" and found["ranks"] == 96 and found["nodes"] == 12
    assert any(each["kind"] == "not given" for each in found["in_the_way"])
