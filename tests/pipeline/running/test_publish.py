"""Models go to a Hub on loopback: the finished folder, once; no token in the run folder; refusals explained."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from omegaconf import OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.pipeline.composing.compose import load
from ppo_vs_dpo.pipeline.running.publish import publish, wanted

TOKEN = "hf_" + "secret" * 5


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that an upload of small files uses."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            name = json.loads(body)["name"]
            return self.answer({"url": f"{hub.address}/someone/{name}", "id": f"someone/{name}"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            hub.commits.append(
                {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
            )
            return self.answer({"commitOid": "0" * 40, "commitUrl": f"{hub.address}/someone/x/commit/{'0' * 40}"})
        return self.answer({"error": f"unexpected {self.path}"}, 404)

    def do_GET(self):
        self.answer({"error": "Not found"}, 404)

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.commits = [], []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    from huggingface_hub.utils import close_session

    close_session()  # a session made offline stays offline
    yield server
    server.shutdown()
    close_session()


@pytest.fixture
def run(tmp_path):
    """A run whose PPO stage is finished, with a model folder of two files."""
    sections = {"ppo": {"push_to_hub": True, "hub_model_id": "someone/ppo-policy", "hub_private_repo": True}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**sections, "dpo": {}})))
    folder = RunFolder(tmp_path)
    (tmp_path / "ppo" / "model").mkdir(parents=True)
    (tmp_path / "ppo" / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "ppo" / "model" / "model.safetensors").write_bytes(bytes(range(256)))
    folder.finish("ppo", "abc", 1.0, {})
    folder.finish("dpo", "abc", 1.0, {})
    return folder


def test_a_finished_model_is_pushed_once(run, hub, capsys):
    publish(run, ["sft", "ppo", "dpo"])
    (made,) = hub.created
    assert (made["name"], made["visibility"]) == ("ppo-policy", "private")
    (files,) = hub.commits
    assert files["model.safetensors"] == bytes(range(256))
    assert files["config.json"] == b'{"model_type": "llama"}'
    assert "ppo: pushed to " in capsys.readouterr().out
    publish(run, ["ppo"])
    assert len(hub.commits) == 1
    run.finish("ppo", "def", 1.0, {})  # trained anew
    publish(run, ["ppo"])
    assert len(hub.commits) == 2
    run.path("ppo", "pushed.json").write_bytes(b"{")  # torn: pushed again, and the run does not stop for good
    publish(run, ["ppo"])
    publish(run, ["ppo"])
    assert len(hub.commits) == 3


def test_no_token_reaches_the_run_folder(run, hub):
    publish(run, ["ppo"])
    for path in run.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_wrong_token_is_explained_and_costs_nothing(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        UserError, match=r"(?s)ppo\.push_to_hub: someone/ppo-policy could not be pushed.*HF_TOKEN"
    ) as e:
        publish(run, ["ppo"])
    assert "hf_wrong" not in str(e.value)
    assert run.done("ppo")
    assert not run.path("ppo", "pushed.json").exists()


def test_no_hub_is_explained(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be pushed"):
        publish(run, ["ppo"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()
    with pytest.raises(UserError, match="could not be pushed"):
        publish(run, ["ppo"])


def test_a_push_without_a_name_is_refused_before_anything_runs(run):
    config = OmegaConf.create({"ppo": {"push_to_hub": True}})
    with pytest.raises(UserError, match=r"ppo\.hub_model_id=USER/NAME"):
        wanted(config, "ppo")
    assert wanted(OmegaConf.create({"ppo": {}}), "ppo") is None


@pytest.mark.parametrize("key", ["hub_token=hf_abc", "hub_strategy=all_checkpoints"])
def test_keys_that_do_not_belong_are_refused(key):
    with pytest.raises(UserError, match=rf"sft\.{key.split('=')[0]}: .*remove it"):
        load(["experiment=quickstart", f"sft.{key}"])


def test_pushing_later_does_not_make_a_stage_stale():
    from ppo_vs_dpo.artifacts.guards.fingerprints import COSMETIC

    assert {"push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"} <= set(COSMETIC)
