"""An LLM judge inside the stage, with a real model behind a real OpenAI-compatible server where there is one."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl, read_parquet
from ppo_vs_dpo.compare.estimates.judgements import pair_comparisons, split_pairs
from ppo_vs_dpo.models.sampling.chat import ChatEndpoint
from ppo_vs_dpo.preferences.judging.backends import OpenAIBackend
from ppo_vs_dpo.preferences.judging.llm import Comparison, Judgement, LLMJudge, LLMJudgeConfig
from tests.compare.helpers import make_run, set_config
from tests.compare.server import Server, prefers_longer
from tests.compare.test_stage import compare, figures


@pytest.fixture(scope="module")
def compared(tmp_path_factory, word_tokenizer):
    """A compared run without LLM judges."""
    root = make_run(tmp_path_factory.mktemp("llm") / "run", word_tokenizer)
    compare(root)
    return root


@pytest.fixture
def run(compared, tmp_path):
    shutil.copytree(compared, tmp_path / "run")
    return tmp_path / "run"


def add_judge(root, url, more=""):
    judge = f"kind: llm, name: reader, model: m, base_url: '{url}', retries: 0, n_prompts: 8{more}"
    set_config(root, f"judges: [{{{judge}}}]")


def test_verdicts_reach_the_report(run):
    server = Server(prefers_longer)
    try:
        before = read_json(run / "compare" / "report.json")
        add_judge(run, server.url)
        report = compare(run)
        # sft, ppo, dpo and the largest best-of-n: 6 pairs, 8 prompts, both orders.
        assert len(server.requests) == 6 * 8 * 2
        assert report["judges"]["reader"]["judged"] == 48
        assert report["cost"]["judges"]["reader"]["requests"] == 96
        mine = {(e["policy"], e["versus"]): e for e in report["win_rates"] if e["judge"] == "reader"}
        assert len(mine) == 12
        assert all(entry["n"] == 8 for entry in mine.values())
        assert {tuple(a["judges"]) for a in report["agreement"]} == {
            ("gold", "reward_model"),
            ("gold", "reader"),
            ("reward_model", "reader"),
        }
        rows = read_parquet(run / "compare" / "judgements.parquet").to_pandas().query("judge == 'reader'")
        assert sorted(rows["order"].unique()) == ["forward", "swapped"]
        assert rows["raw"].str.contains("One says more").all()
        # Another judge changes nothing that the others said; a second run asks nothing again.
        assert report["policies"] == before["policies"]
        again = compare(run)
        assert len(server.requests) == 96
        assert figures(again) == figures(report)
    finally:
        server.close()


def test_down_mid_way_writes_the_report_and_says_how_to_go_on(run):
    server = Server(lambda question, number: 500 if number > 20 else prefers_longer(question))
    try:
        add_judge(run, server.url, ", concurrency: 1")
        (run / "compare" / "done.json").unlink()
        with pytest.raises(UserError, match="start the same command again"):
            compare(run)
        assert not (run / "compare" / "done.json").exists()
        report = read_json(run / "compare" / "report.json")
        assert any("stopped early" in warning for warning in report["warnings"])
        assert len(read_jsonl(run / "cache" / "judge_replies.jsonl")) == 20
        server.answer = lambda question, number: prefers_longer(question)
        report = compare(run)
        assert report["judges"]["reader"]["judged"] == 48
        assert len(server.requests) == 21 + 76
        assert (run / "compare" / "done.json").exists()
    finally:
        server.close()


def test_only_a_reading_judge(run):
    """Real data without gold and without a reward model: the LLM's verdict is the verdict."""
    text = (run / "config.yaml").read_text().replace("gold: tests.compare.helpers:gold", "source: files")
    (run / "config.yaml").write_text(text)
    shutil.rmtree(run / "reward_model")
    server = Server(prefers_longer)
    try:
        add_judge(run, server.url)
        report = compare(run)
        assert "by the judge reader" in report["verdict"][0]
        assert "best_of_4" not in report["policies"]
        assert "every prompt" in report["matched_kl"]["refused"]
    finally:
        server.close()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, where RLHF_SMOLLM2 or a folder beside the project has it."""
    folder = Path(os.environ.get("RLHF_SMOLLM2", Path(__file__).parents[4] / "smollm2"))
    if not (folder / "config.json").is_file():
        pytest.skip(f"no SmolLM2 in {folder} (set RLHF_SMOLLM2)")
    return folder


QUESTIONS = [
    ("What is the capital of France?", "The capital of France is Paris.", "Bananas are yellow."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes.", "No."),
]


def chat_comparisons():
    return [Comparison("a", "b", f"q{i}", *texts) for i, texts in enumerate(QUESTIONS)]


@pytest.mark.slow
def test_a_local_model_judges():
    """A model loaded in this process; a small one follows the format badly, and nothing is guessed for it."""
    config = LLMJudgeConfig(model=str(smollm2()), local=True, template="alpaca_eval", concurrency=1, reasks=1)
    judge = LLMJudge(config)
    found, stopped = judge.judge(chat_comparisons())
    assert stopped is None
    assert len(found) == 4
    assert all(one.preference is None or 0 <= one.preference <= 1 for one in found)
    assert all(one.raw for one in found)
    assert judge.usage.completion_tokens > 0


@pytest.mark.slow
def test_a_real_server_with_a_real_model():
    """`transformers serve` on loopback, asked by the openai client as any endpoint is."""
    pytest.importorskip(
        "fastapi", reason="transformers serve needs fastapi and uvicorn: pip install 'transformers[serving]'"
    )
    pytest.importorskip(
        "uvicorn", reason="transformers serve needs fastapi and uvicorn: pip install 'transformers[serving]'"
    )
    folder = smollm2()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()[-2000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        reply = OpenAIBackend(ChatEndpoint(str(folder), url, timeout=120)).ask(
            [{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0.0, seed=0
        )
        assert reply.text.strip()
        config = LLMJudgeConfig(model=str(folder), base_url=url, template="alpaca_eval", timeout=120, concurrency=2)
        found, stopped = LLMJudge(config).judge(chat_comparisons())
        assert stopped is None
        assert len(found) == 4
        assert all(one.preference in (None, 0.0, 0.5, 1.0) or 0 <= one.preference <= 1 for one in found)
    finally:
        process.terminate()
        process.wait(20)


def test_a_judge_that_reads_is_checked_on_held_out_pairs(run):
    """Asked about pairs, too: what it is worth stands in the report, and its verdicts of policies are the same."""
    server = Server(prefers_longer)
    try:
        add_judge(run, server.url)
        plain = compare(run)
        set_config(run, "check_pairs: 2")
        report = compare(run)
        # Two of the three pairs, both orders, beside the six pairs of policies; nothing is asked twice.
        assert len(server.requests) == 6 * 8 * 2 + 2 * 2
        assert set(report["judges"]["reader"]["heldout"]) == {"n", "right"}
        mine = [[e for e in one["win_rates"] if e["judge"] == "reader"] for one in (plain, report)]
        assert mine[0] == mine[1]
        assert "heldout" not in plain["judges"]["reader"]
    finally:
        server.close()


def test_right_and_wrong_on_pairs():
    pairs = [{"prompt": "a", "chosen": " good", "rejected": " bad"}, {"prompt": "b", "chosen": " x", "rejected": " y"}]
    asked = pair_comparisons([*pairs, {}], 2)
    assert [(one.ours, one.theirs, one.prompt_id) for one in asked] == [
        (" good", " bad", "pair 0"),
        (" x", " y", "pair 1"),
    ]
    chat = [{"role": "assistant", "content": "fine"}]
    assert pair_comparisons([{"prompt": "a", "chosen": chat, "rejected": chat}], 9)[0].ours == "fine"
    seen = {"pair 0": (1.0, 1.0), "pair 1": (1.0, 0.0), "pair 2": (0.0, 0.0), "pair 3": (1.0, None)}
    judgements = [
        Judgement("j", "chosen", "rejected", name, order, preference, "", 1)
        for name, both in seen.items()
        for order, preference in zip(("forward", "swapped"), both, strict=True)
    ]
    other = Judgement("j", "ppo", "dpo", "x", "forward", 1.0, "", 1)
    # Right, a tie over both orders, wrong, and one without a verdict.
    assert split_pairs([*judgements, other]) == ([other], {"n": 2, "right": 1})
