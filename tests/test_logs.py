"Logs of other programs: what each says of a response, and that nothing in them breaks the reading."
import json
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, HealthCheck, strategies as st

from capo.evaluate import assess
from capo.logs import LOG_FORMATS, LONGEST_LINE, log_rows, records
from capo.responses import convert, read_responses


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# lm-evaluation-harness 0.4, `--log_samples`

def lm_eval(doc, texts, answers, right, filter="strict-match"):
    return {"doc_id": doc, "doc": {"question": f"{doc}?"}, "target": "9",
            "arguments": {"gen_args_0": {"arg_0": f"Q: {doc}?\nA:", "arg_1": {"until": ["\n"]}}},
            "resps": [texts], "filtered_resps": answers, "filter": filter, "metrics": ["exact_match"],
            "doc_hash": "d", "prompt_hash": "p", "target_hash": "t", "exact_match": right}


def test_lm_eval_generations_of_the_first_filter(tmp_path):
    lines = [lm_eval(i, [f"It is {a}"], [a], float(a == "9"), f) for f in ("strict-match", "flexible-extract") for i,
             a in enumerate("9519")]
    r = read_responses(write(tmp_path / "samples_gsm8k_2026.jsonl", *lines))
    assert r.refused == 0 and r.id == list("0123") and r.correct.tolist() == [True, False, False,
        True] and r.answer == list("9519")
    assert r.scores == {} and r.prompt[0] == "Q: 0?\nA:"
    a = assess(r)
    assert a["accuracy"].value == .5 and a["auc_mean"].note


def test_lm_eval_repeats_are_graded_by_the_target(tmp_path):
    r = read_responses(write(tmp_path / "s.jsonl", lm_eval(0, ["a", "b", "c"], [["9", "8", "9.0"]], 1.)))
    assert r.size.tolist() == [3] and r.correct.tolist() == [True, False, True]


def test_lm_eval_multiple_choice_has_a_confidence(tmp_path):
    choice = {"doc_id": 0, "doc": {}, "target": 1, "arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": " A"}},
              "resps": [[["-2.3", "False"]], [["-1.2", "True"]]],
              "filtered_resps": [["-2.3", "False"], ["-1.2", "True"]], "filter": "none",
              "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0}
    r = read_responses(write(tmp_path / "s.jsonl", choice))
    assert r.correct.tolist() == [True] and r.answer == ["1"] and r.probabilities == ("confidence",)
    assert r.score.item() == pytest.approx(1 / (1 + math.exp(-1.1)))


# lighteval 0.13, details_*.parquet

def lighteval(texts, metric, logprobs=(), choices=("9",), gold=0):
    return {"doc": {"id": "3", "query": "4+5?", "choices": list(choices), "gold_index": [gold], "task_name": "t"},
            "metric": metric,
            "model_response": {"text": list(texts), "logprobs": list(logprobs),
                               "output_tokens": [[1, 2]] * len(texts), "input_tokens": [1]}}


def test_lighteval_details(tmp_path):
    one = read_responses(parquet(tmp_path / "a.parquet", [lighteval(["So 9"], {"extractive_match": 1.0})]))
    many = read_responses(parquet(tmp_path / "b.parquet", [lighteval(["So 9", "So 8"], {"avg@2": .5})]))
    choice = read_responses(parquet(tmp_path / "c.parquet",
                                    [lighteval([], {"loglikelihood_acc": 0.}, [-1., -2.], ["A", "B"], 1)]))
    assert one.correct.tolist() == [True] and one.length.tolist() == [2] and one.prompt == ["4+5?"]
    assert many.correct.tolist() == [True, False] and many.size.tolist() == [2]
    assert choice.correct.tolist() == [False]
    assert choice.answer == ["A"] and choice.score.item() == pytest.approx(1 / (1 + math.exp(-1)))


# Inspect 0.3, .json and .eval

def inspect(id, epoch, value):
    return {"id": id, "epoch": epoch, "input": [{"role": "user", "content": "4+5?"}], "target": "9", "messages": [],
            "metadata": {},
            "output": {"model": "m", "usage": {"input_tokens": 3, "output_tokens": 2}, "choices": [
                {"message": {"role": "assistant", "content": [{"type": "text", "text": "It is 9"}]},
                 "stop_reason": "stop",
                 "logprobs": {"content": [{"token": "It", "logprob": -.5}, {"token": "9", "logprob": -.1}]}}]},
            "scores": {"match": {"value": value, "answer": "9", "explanation": ""}}}


def test_inspect_logs(tmp_path):
    samples = [inspect("a", e, v) for e, v in enumerate("CIN", 1)] + [inspect("b", 1, 1)]
    (tmp_path / "log.json").write_text(json.dumps({"version": 2, "status": "success", "eval": {"task": "t"},
                                                   "samples": samples}, indent=2))
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("header.json", "{}")
        for s in samples: z.writestr(f"samples/{s['id']}_epoch_{s['epoch']}.json", json.dumps(s))
    for name in ("log.json", "log.eval"):
        r = read_responses(tmp_path / name)
        assert r.refused == 0 and r.id == ["a", "b"] and r.correct.tolist() == [True, False, False,
            True] and r.reference == ["9", "9"]
        assert r.scores["lpm"].tolist() == pytest.approx([-.3] * 4)
        assert r.length.tolist() == [2] * 4 and r.text[0] == "It is 9"


def zstandard(path, samples, cut=0, claimed=None):
    "An archive as Inspect packs it by zstandard, here in two frames; a `cut` damages the last member."
    import pyarrow as pa
    codec = pa.Codec("zstd")
    with zipfile.ZipFile(path, "w") as z:
        for i, sample in enumerate(samples):
            data, name = json.dumps(sample).encode(), f"samples/{i}.json"
            packed = b"".join(codec.compress(x, asbytes=True) for x in (data[:50], data[50:]))
            z.writestr(name, packed[cut:] if i == len(samples) - 1 else packed)
            about = z.getinfo(name)
            about.compress_type, about.file_size = 93, claimed or len(data)
    return path


def test_inspect_logs_packed_by_zstandard(tmp_path):
    samples = [inspect("a", 1, "C"), inspect("a", 2, "I"), inspect("b", 1, "C")]
    r = read_responses(zstandard(tmp_path / "log.eval", samples))
    assert r.refused == 0 and r.correct.tolist() == [True, False, True] and r.text == ["It is 9"] * 3
    r = read_responses(zstandard(tmp_path / "cut.eval", samples, cut=5))
    assert r.refused == 1 and len(r.text) == 2 and "samples/2.json cannot be unpacked" in r.flaws[0]
    with pytest.raises(ValueError, match="longer than 256 MB"):
        read_responses(zstandard(tmp_path / "long.eval", samples, claimed=1 << 30))


def test_a_damaged_member_of_an_archive_is_one_flaw(tmp_path):
    path = tmp_path / "log.eval"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(3): z.writestr(f"samples/{i}.json", json.dumps(inspect(str(i), 1, "C")))
        at = z.getinfo("samples/1.json").header_offset
    data = bytearray(path.read_bytes())
    data[at + 60:at + 90] = bytes(30)
    path.write_bytes(data)
    r = read_responses(path)
    assert r.refused == 1 and r.id == ["0", "2"] and "samples/1.json cannot be unpacked" in r.flaws[0]


# vLLM's RequestOutput and OpenAI's completions

def test_vllm_outputs(tmp_path):
    tops = lambda *p: {str(i): {"logprob": x, "rank": i + 1, "decoded_token": "t"} for i, x in enumerate(p)}
    out = lambda i, text, end: {"index": i, "text": text, "token_ids": [5, 6], "cumulative_logprob": -.6,
                                "logprobs": [tops(-.1, -2.1), tops(-.5, -1.5)], "finish_reason": end}
    dump = {"request_id": "7", "prompt": "4+5?", "prompt_token_ids": [1],
            "outputs": [out(0, "It is 9", "stop"), out(1, "It is 9 or", "length")], "finished": True, "reference": "9"}
    r = read_responses(write(tmp_path / "v.jsonl", dump))
    assert r.id == ["7"] and r.correct.tolist() == [True, False] and r.truncated.tolist() == [False, True]
    assert r.scores["lpm"].tolist() == pytest.approx([-.3] * 2)
    assert r.scores["token_confidence"].tolist() == pytest.approx([1.05] * 2)
    bare = write(tmp_path / "b.jsonl", {k: v for k, v in dump.items() if k != "reference"})
    with pytest.raises(ValueError, match="it has neither correct nor reference"): read_responses(bare)


def chat(text, *logps):
    return {"object": "chat.completion", "id": "chatcmpl-1",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop",
            "logprobs": {"content": [{"token": "t", "logprob": x,
                                      "top_logprobs": [{"token": "t", "logprob": x},
                                                       {"token": "u", "logprob": x - 1}]} for x in logps]}}]}


def test_openai_completions_and_batches(tmp_path):
    text = {"object": "text_completion", "id": "cmpl-1",
            "choices": [{"index": i, "text": str(i), "finish_reason": "length",
                         "logprobs": {"tokens": ["a"], "token_logprobs": [None, -1.]}} for i in (0, 1)]}
    batch = [{"id": "batch_req_1", "custom_id": f"q{i}",
              "response": {"status_code": 200, "body": chat("9", -.2, -.4)}, "error": None, "correct": i % 2}
              for i in range(3)]
    failed = {"custom_id": "q9", "response": {"status_code": 500, "body": {}}, "error": {"code": "x"}}
    r = read_responses(write(tmp_path / "b.jsonl", *batch, failed))
    assert r.id == ["q0", "q1", "q2"] and r.correct.tolist() == [False, True,
                                                                 False]
    assert r.refused == 1 and "the request failed" in r.flaws[0]
    assert r.scores["lpm"].tolist() == pytest.approx([-.3] * 3)
    assert r.scores["token_confidence"].tolist() == pytest.approx([.8] * 3)
    r = read_responses(write(tmp_path / "t.jsonl", text | {"reference": "1"}))
    # both were cut off
    assert r.size.tolist() == [2] and r.correct.tolist() == [False, False] and r.scores["lpm"].tolist() == [-1, -1]


# verl and TRL

def test_verl_dumps(tmp_path):
    row = lambda q, out, score, **more: {"input": f"user\n{q}", "output": out, "gts": "9", "score": score,
                                         "step": 4} | more
    r = read_responses(write(tmp_path / "4.jsonl", row("a", "9", 1.), row("a", "8", -1.), row("b", "9", .3, acc=True)))
    assert r.refused == 0 and r.size.tolist() == [2, 1] and r.correct.tolist() == [True, False,
        True] and r.reference == ["9", "9"]
    assert "score" not in r.scores                                              # it is verl's reward, and no confidence


def test_trl_completions(tmp_path):
    row = lambda q, text, **rewards: {"step": 10, "prompt": [{"role": "user", "content": q}],
                                      "completion": [{"role": "assistant", "content": text}], "advantage": .5} | rewards
    one = parquet(tmp_path / "completions_00010.parquet",
                  [row("a", "9", reward_func=1.), row("a", "8", reward_func=0.)])
    r = read_responses(one)
    assert r.prompt == ["a"] and r.text == ["9", "8"] and r.correct.tolist() == [True, False]
    two = parquet(tmp_path / "two.parquet", [row("a", "9", format_reward=.5, accuracy_reward=1.)])
    assert read_responses(two).correct.tolist() == [True]
    odd = parquet(tmp_path / "odd.parquet", [row("a", "9", x=1., y=0.)])
    with pytest.raises(ValueError, match="which of its columns says what is right"): read_responses(odd)
    assert read_responses(odd, columns={"correct": "y"}).correct.tolist() == [False]


# Tables

def test_a_table_with_columns_of_its_own(tmp_path):
    (tmp_path / "t.csv").write_text('q,ok,p,judge,text\n007,1,0.25,.9,"one, two"\n8,0,.5,,"x\ny"\n')
    named = {"id": "q", "correct": "ok", "confidence": ["p", "judge"], "response": "text"}
    r = read_responses(tmp_path / "t.csv", columns=named)
    assert r.id == ["007", "8"] and r.correct.tolist() == [True, False] and r.text == ["one, two", "x\ny"]
    assert r.probabilities == ("p", "judge") and r.scores["p"].tolist() == [.25,
        .5] and math.isnan(r.scores["judge"][1])
    p = parquet(tmp_path / "t.parquet", [{"q": 7.0, "ok": True, "p": .25, "judge": None, "text": None}])
    assert read_responses(p, columns=named).id == ["7"]


def test_a_bare_table_is_recognised_by_its_header(tmp_path):
    (tmp_path / "pipe").write_text("id;correct;score\na;1;-3\nb;0;-5\n")
    r = read_responses(tmp_path / "pipe")
    assert r.id == ["a", "b"] and list(r.scores) == ["score"] and r.score.tolist() == [-3, -5]


# The reading

def test_converted_logs_read_the_same(tmp_path):
    log = write(tmp_path / "v.jsonl", *(lm_eval(i, ["It is 9"], ["9"], i % 2) for i in range(4)),
                {"doc_id": 1, "resps": 3})
    n, flaws = convert(log, tmp_path / "own.jsonl.gz")
    a, b = read_responses(log), read_responses(tmp_path / "own.jsonl.gz")
    assert n == 4 and len(flaws) == a.refused == 1 and b.refused == 0 and "looks like a record of lm-eval" in flaws[0]
    assert a.id == b.id and a.correct.equal(b.correct) and a.text == b.text and a.answer == b.answer


def test_a_format_can_be_named_and_must_be_known(tmp_path):
    path = write(tmp_path / "x.jsonl", {"id": 1, "correct": 1})
    assert read_responses(path, format="capo").correct.tolist() == [True]
    known = "lm-eval, lighteval, inspect, vllm, openai, verl, trl, capo"
    with pytest.raises(ValueError, match=f"format must be one of {known}; it is x"): read_responses(path, format="x")


def test_a_line_of_gigabytes_is_skipped_unread(tmp_path):
    import gzip, tracemalloc
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", 1) as f:
        f.write(b'{"id": 1, "correct": 1}\n{"id": 2, "response": "')
        for _ in range(40): f.write(b"a" * (LONGEST_LINE // 4))
        f.write(b'"}\n{"id": 3, "correct": 0}\n')
    tracemalloc.start()
    r = read_responses(path)
    assert r.id == ["1", "3"] and r.refused == 1 and "line 2: it is longer than 32 MB" in r.flaws[0]
    assert tracemalloc.get_traced_memory()[1] < 5 * LONGEST_LINE
    tracemalloc.stop()


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
                    max_leaves=6)
KEYS = {"lm-eval": ["doc_id", "resps", "target", "filtered_resps", "metrics", "arguments"],
        "lighteval": ["doc", "model_response", "metric"],
        "inspect": ["epoch", "output", "target", "id", "input", "scores"],
        "vllm": ["outputs", "prompt", "request_id"], "openai": ["choices", "response", "id"],
        "verl": ["input", "output", "score"], "trl": ["prompt", "completion", "r"],
        "capo": ["id", "correct", "confidence"]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.sampled_from([f.name for f in LOG_FORMATS]), st.data())
def test_no_record_gives_a_traceback(tmp_path, name, data):
    record = {k: data.draw(JSON) for k in KEYS[name]}
    path = write(tmp_path / "r.jsonl", record, {"id": 1, "correct": 1})
    assert all(isinstance(row, (dict, ValueError)) for _, row in log_rows(path))
    try: read_responses(path)
    except ValueError as e: assert "\n" not in str(e)


def test_records_say_where_they_are(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2}\nno\n')
    assert [(n, isinstance(r, ValueError)) for n, r in records(path)] == [(1, False), (3, False), (4, True)]


RLCR = Path(os.environ.get("CAPO_RLCR", "none"))


@pytest.mark.skipif(not RLCR.is_dir(),
                    reason="CAPO_RLCR names no folder with the responses of arXiv 2507.16806 to MATH-500")
def test_the_numbers_of_somebody_else(tmp_path):
    "Accuracy, AUROC, Brier and ECE as the authors of RLCR give them for five set-ups (damanimehul/RLCR, 8904bed)."
    theirs = json.loads((RLCR / "math-500.metrics.json").read_text())
    head, *lines = (RLCR / "math-500.csv").read_text().splitlines()
    for method, want in theirs.items():
        path = tmp_path / "one.csv"
        path.write_text("\n".join([head, *(x for x in lines if f",{method}," in x)]))
        a = assess(read_responses(path, columns={"id": "row", "confidence": "confidence"}))
        found = {k: a[n].value for k,
                 n in (("accuracy", "accuracy"), ("auroc", "pooled_auc"), ("brier_score", "brier"))}
        assert found == pytest.approx({k: want[k] for k in found}, abs=5e-5), method
        assert a["ece"].value == pytest.approx(.1889 if method == "RLCR" else want["ece"], abs=5e-5), method
        # closed on the left, and 1 in the last bin, ten bins give what the authors give
        p, c = a.responses.score, a.responses.correct.double()
        at = torch.bucketize(p, torch.arange(1, 10, dtype=p.dtype) / 10, right=True)
        gaps = torch.zeros(10, dtype=p.dtype).index_add(0, at, c - p).abs()
        assert gaps.sum().item() / len(p) == pytest.approx(want["ece"], abs=5e-5), method
