"The report: what it says, that nothing a model wrote becomes part of the page, and that its files can be read."
import csv
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from capo.page import (Code, Grid, Value, Paragraph, for_terminal, in_html, in_markdown, plain, save_report,
                       shorten, ticks, visible)
from capo.report import curves_of, draw_confidence, draw_risk, examples, named, report, short_names
from capo.evaluate import assess, padded
from capo.responses import gather
from capo.vote import majority_vote, most_confident
from helpers import responses, two_runs

EVIL = ("<script>alert('9')</script><img src=x onerror=alert(1)> | `a` ``` \n\n# head $x$ \u202e\x00\ud800 "
        "**b** &amp; [l](javascript:1) ]]> </pre></article>")


def rows(r, text=lambda q, g: f"text {q} {g}", **other):
    place = {}
    def row(i, q):
        g = place[q] = place.get(q, -1) + 1
        return {"id": r.id[q], "prompt": f"q{q}", "response": text(q, g), "answer": r.answer[i],
                "correct": bool(r.correct[i]), "lpm": r.score[i].item()}
    return [row(i, q) | other for i, q in enumerate(r.question.tolist())]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    for name, r in zip(("grpo", "capo"), two_runs(12, 4)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "responses.jsonl", rows(r))
    return [tmp_path / name / "responses.jsonl" for name in ("grpo", "capo")]


class Page(HTMLParser):
    "Tags, attributes and text of a page; fails on tags that do not match."
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(page); self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.attributes += attrs
        if tag not in ("img", "meta"): self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.tags.append(tag); self.attributes += attrs

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text += data


PICTURES = ["auc", "confidence_0", "confidence_1", "risk_coverage", "votes_0", "votes_1"]


def test_the_folder_of_a_report(files, tmp_path):
    made, out = report(files, tmp_path / "out"), tmp_path / "out"
    assert sorted(p.name
                  for p in out.iterdir()) == sorted(["report.html", "report.md", "summary.json",
                                                     *(f"{n}.svg" for n in PICTURES)])
    text, page = (out / "report.md").read_text(), Page((out / "report.html").read_text())
    assert all(f"]({n}.svg)" in text for n in PICTURES) and "`grpo`" in text and "`capo`" in text
    assert ("name", "viewport") in page.attributes and page.tags.count("script") == 1 and "link" not in page.tags
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6 and not {"src", "href", "onclick"} & {k for k,
        _ in page.attributes}
    style = (out / "report.html").read_text()
    assert "prefers-color-scheme: dark" in style and "http" not in style.replace("http://www.w3.org/2000/svg", "")
    for n in PICTURES: assert (out / f"{n}.svg").read_text().count("<title>") == 1
    said = str(made)
    assert "AUC-mean " in said and "questions are shared" in said and "alert" not in said and "text 0 0" not in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_verdict_comes_first(files):
    made = report(files[0])
    assert made.blocks[0].kind == "verdict"
    assert str(made).startswith("Its confidence") and "one response" in str(made).replace("\n", " ")
    assert report(files).blocks[0].markdown().startswith("On the 12 questions that both answer, capo is ")


def test_tables_as_csv(files, tmp_path):
    report(files, tmp_path / "out", tables=True)
    found = {p.stem: list(csv.reader(p.open())) for p in (tmp_path / "out").glob("*.csv")}
    assert {"differences", "how_often_it_is_right", "whether_it_knows_when"} <= found.keys()
    assert found["how_often_it_is_right"][0] == ["", "grpo",
                                                 "capo"] and found["differences"][1][0] == "↑ accuracy, mean of 4"


def test_the_summary_is_strict_json(files, tmp_path):
    write(files[0], rows(two_runs(5, 3)[0], correct=True))             # one class: numbers that are not there
    report(files, tmp_path / "out")
    def refuse(x): raise AssertionError(x)
    summary = json.loads((tmp_path / "out/summary.json").read_text(), parse_constant=refuse)
    assert summary["sets"]["grpo"]["numbers"]["auc_mean"] == {"value": None, "low": None, "high": None,
                                                              "note": "all responses are right"}
    assert summary["sets"]["capo"]["numbers"]["accuracy"]["value"] == pytest.approx(two_runs(12,
        4)[1].correct.double().mean().item())
    assert summary["sets"]["capo"]["counts"]["questions"] == 12 and summary["differences"]["capo"]["shared"] == 5
    assert summary["verdict"] and summary["sets"]["capo"]["by"] == "lpm"


def test_a_full_disk_leaves_nothing(files, tmp_path, monkeypatch):
    made, whole, written = report(files), Path.write_text, []
    def full(path, text, **options):
        written.append(path)
        if len(written) > 4: raise OSError(28, "No space left on device")
        return whole(path, text, **options)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"): save_report(made, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["capo", "grpo"]


def test_the_same_files_give_the_same_report(files, tmp_path):
    for name in ("a", "b"): report(files, tmp_path / name)
    for p in (tmp_path / "a").iterdir(): assert p.read_bytes() == (tmp_path / "b" / p.name).read_bytes(), p.name


def test_what_a_model_wrote_stays_text(tmp_path):
    r = two_runs(6, 3)[0]
    evil = rows(r, lambda q, g: EVIL + str(g), prompt=EVIL, answer=EVIL, reference=EVIL)
    path = write(tmp_path / "a<b>&$_$.jsonl", evil + [{"id": "<script>"}])
    made = report(path, tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert page.tags.count("script") == 1 and not {"b", "img"} & set(page.tags) and [k for k, _ in page.attributes
        if k.startswith("on")] == []
    assert page.text.count("<script>alert('9')</script>") >= 6 and "onerror=alert(1)" in page.text
    for text in (page.text, (tmp_path / "out/report.md").read_text(), str(made)): assert not {"\u202e",
        "\x00"} & set(text)
    assert made._repr_html_().count("<article") == page.tags.count("article") >= 2
    for p in (tmp_path / "out").glob("*.svg"): assert "<b>" not in p.read_text()


@given(st.text(max_size=40))
def test_html_shows_any_text_and_has_no_other_tag(text):
    for x, tags in ((text, []), (Code(text), ["code"])):
        page = Page(in_html(x))
        assert page.tags == tags and page.text.replace("\r\n", "\n").replace("\r", "\n") == visible(text)
    assert "<" not in in_html(Value(text)).replace("<small>", "").replace("</small>", "")


def code_spans(line):
    "What GitHub shows of a line that is one table cell: code spans as (text,), the rest as text."
    out, i = [], 0
    while i < len(line):
        run = re.match("`+", line[i:])
        if not run: out.append(line[i]); i += 1; continue
        end = re.search(rf"(?<!`){run[0]}(?!`)", line[i + len(run[0]):])
        if not end: out.append(run[0]); i += len(run[0]); continue
        out.append((line[i + len(run[0]):i + len(run[0]) + end.start()],)); i += len(run[0]) + len(run[0]) + end.start()
    return out


@given(st.text(alphabet="`|a <\\\n*$", max_size=20))
def test_markdown_shows_any_text_in_one_code_span_of_one_cell(text):
    line = in_markdown(Code(text))
    assert "\n" not in line and not re.search(r"(?<!\\)\|", line)
    flat = " ".join(text.split())
    if not flat: return
    (span,), = code_spans(line)
    assert " ".join(span.replace(r"\|", "|").split()) == flat


def test_a_table_in_text():
    assert Grid("t", [["", Code("a|b")], ["accuracy", Value("0.5 [0.4, 0.6]")]]).markdown() == (
        "|          | `a\\|b`         |\n|----------|----------------|\n| accuracy | 0.5 [0.4, 0.6] |")
    assert Grid("t", [["x"], [Value("0.5 [0.4, 0.6]")]]).html().count("<small>[0.4, 0.6]</small>") == 1
    assert Paragraph(["of ", Code("a"), " and b"]).markdown() == "of `a` and b"


@pytest.mark.parametrize("sets", [1, 2, 3, 6, 20])
def test_a_table_in_a_terminal_has_eighty_columns(sets):
    table = for_terminal([["", *(f"run {i}" for i in range(sets))],
                          ["AUC of brevity alone, pooled", *["0.500 [0.400, 0.600]"] * sets]])
    assert max(map(len, table.splitlines())) <= 80 and "0.500" in table and ("[" in table) == (sets < 3)


def test_shortening_keeps_both_ends():
    assert shorten("abc", 3) == "abc" and shorten("a" * 50 + "b" * 50, 10) == "aaa … bbbbbbb"
    assert visible("a\tb\nc\x1b[31m\u202ed") == "a\tb\nc\ufffd[31m\ufffdd"


@pytest.mark.parametrize("low, high, want",
                         [(0, 1, [0, .2, .4, .6, .8, 1]), (0, 4, [0, 1, 2, 3, 4]), (-3.2, 0, [-3, -2, -1, 0])])
def test_ticks_are_round(low, high, want): assert ticks(low, high) == pytest.approx(want)


def test_names_in_a_figure_are_text():
    r = two_runs(4, 3)[0]
    for name in ("$x$", "_hidden", "$", "a\nb", "é" * 99, "</svg><script>"):
        for picture in (draw_confidence(name, r), draw_risk({name: assess(r)})):
            Page(picture.html()); assert "<script" not in picture.html()
    assert short_names(["x" * 60 + "a", "x" * 60 + "b"], 20) == ["…" + "x" * 9 + "a", "…" + "x" * 9 + "b"]


def test_names_of_files(tmp_path, files):
    r = two_runs(4, 3)[0]
    assert list(named(files)) == ["grpo",
                                  "capo"] and list(named(r)) == ["responses 1"] and list(named({"x": files[0],
                                      "y": r})) == ["x", "y"]
    other = write(tmp_path / "grpo.jsonl", rows(r))
    assert list(named([files[0], other])) == [str(files[0]), str(other)]
    with pytest.raises(ValueError, match="different files"): named([files[0], files[0]])
    with pytest.raises(ValueError, match="one or several"): named([])


def test_examples_are_the_surprises_one_a_question():
    lpm = torch.tensor([[-.1, -.2, -.3, -.4], [-.1, -.15, -.8, -.9]])
    r = responses(lpm, torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]), torch.ones(2, 4).bool())
    confidence = lambda right: [round(e.confidence, 3) for e in examples(r, right, 3)]
    assert confidence(False) == [.905, .905] and confidence(True) == [.407, .741]


def test_the_curves_end_at_the_votes_themselves():
    r = two_runs(10, 4)[0]
    curves, g = curves_of(r), padded(r)
    assert all(n == [1, 2, 4] for n, _ in curves.values()) and "DeepConf" not in curves
    ends = {"majority": majority_vote(g.group, g.correct), "most confident": most_confident(g.lpm, g.correct),
            "any is right": g.correct.any(1).double()}
    for k, v in ends.items(): assert curves[k][1][-1] == pytest.approx(v.mean().item(), abs=1e-6)
    accuracy = r.correct.double().mean().item()
    assert curves["one at random"][1] == pytest.approx([accuracy] * 3)
    assert curves["most confident"][1][0] == pytest.approx(accuracy)


def test_refused_lines_stand_in_a_box_at_the_top(tmp_path):
    path = write(tmp_path / "r.jsonl", rows(two_runs(4, 3)[0]) + [{"id": 1}] * 30)
    made = report(path, tmp_path / "out")
    assert made.refused == 30
    assert made.blocks[0].kind == "box" and str(made).startswith("> `r`: 30 lines could not be used")
    text = (tmp_path / "out/report.md").read_text()
    assert f"{path}, line 13: it has neither correct nor reference" in text and "30 in all" in text
    assert json.loads((tmp_path / "out/summary.json").read_text())["sets"]["r"]["counts"]["refused lines"] == 30


def test_responses_with_everything(tmp_path):
    g = torch.Generator().manual_seed(0)
    tokens = lambda: [float(x) for x in torch.rand(3, generator=g)]
    extra = [row | {"token_confidence": tokens(), "length": 3 + i % 5, "truncated": i % 7 == 0,
                    "confidence": (i % 9) / 8} for i, row in enumerate(rows(two_runs(60, 4)[0]))]
    report(write(tmp_path / "r.jsonl", extra), tmp_path / "out", precision=.3)
    said = (tmp_path / "out/report.md").read_text()
    assert "Not available" not in said and "DeepConf of 4" in said
    assert "Which confidence to trust" in said and (tmp_path / "out/reliability.svg").exists()
    assert "are few questions" not in said and "are few questions" in str(report(gather(extra[:160])))
    assert report(gather(extra), by="confidence").summary["sets"]["responses 1"]["by"] == "confidence"


def test_one_response_a_question_reads_naturally(tmp_path):
    made = report(write(tmp_path / "r.jsonl",
                        [{"id": i, "lpm": -.1 * (i % 7), "correct": i % 3 > 0, "response": "x"} for i in range(60)]),
                        tmp_path / "out")
    said = str(made)
    assert "one response each" in said and "there is no vote" in said.replace("\n",
        " ") and "majority" not in said and not list((tmp_path / "out").glob("votes*"))


def test_one_question_and_one_class(tmp_path):
    for right in (True, False):
        said = str(report(write(tmp_path / "r.jsonl", [{"id": 1, "lpm": -.5, "correct": right}]),
                          tmp_path / "out")).replace("\n", " ")
        assert f"all responses are {'right' if right else 'wrong'}" in said and "few questions" in said


def test_what_is_odd_and_what_is_within_noise_reads_as_sentences(files, tmp_path):
    path = write(tmp_path / "sums.jsonl", [{"id": i, "correct": i % 2, "lpm": -100 - i} for i in range(40)])
    assert "are they sums?" in str(report(path)) and "?." not in str(report(path))
    said = " ".join(str(report(files)).split("\n\n")[0].split())
    assert re.match(r"On the 12 questions that both answer, capo is (better|worse|no better .*) than grpo", said)
    assert re.search(r"AUC, pooled \([+-]\d\.\d{3}\)", said)


def test_columns_of_confidences_that_nothing_fills_are_left_out(tmp_path):
    row = lambda i: {"id": i, "correct": i % 3 > 0, "confidence": i / 40, "score": i % 7}
    table = next(x for x in str(report(write(tmp_path / "one.jsonl", map(row, range(40))))).split("\n\n")
                 if x.startswith("one  ") and "confidence" in x)
    assert "AUC, pooled" in table and "AUC-mean" not in table and "brevity" not in table


def test_nothing_but_empty_responses(tmp_path):
    said = str(report(gather({"id": i // 2, "correct": 0, "length": 0} for i in range(8)), tmp_path / "out"))
    assert "Empty, and wrong: 8" in said.replace("\n", " ") and "0.000" in said


def test_without_any_confidence(tmp_path):
    said = str(report(gather({"id": i // 2, "correct": i % 3 > 0, "answer": str(i)} for i in range(8)),
                      tmp_path / "out"))
    assert said.startswith("Whether its confidence can be trusted cannot be told") and "majority of 2" in said


def test_runs_on_other_questions_stand_side_by_side_without_a_difference(files, tmp_path):
    write(files[1], rows(two_runs(3, 3)[0], id="other"))
    made = report(files)
    assert made.summary["differences"] == {}
    assert "minus the first" not in str(made) and "share no question id" in str(made).replace("\n", " ")


def test_a_page_of_ten_thousand_long_responses_is_small(tmp_path):
    long = {"prompt": "p" * 3000, "response": "x" * 3000, "answer": None}
    r = gather(long | {"id": i, "correct": (i * 7) % 3 > 0, "lpm": -(i % 11) / 10} for i in range(10_000))
    report(r, tmp_path / "out")
    assert (tmp_path / "out/report.html").stat().st_size < 200_000


def test_plain():
    assert plain({"a": [1, math.nan, (math.inf, "x")], 2: None}) == {"a": [1, None, [None, "x"]], "2": None}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
document.querySelectorAll('details').forEach(d => d.open = true);
const sizes = [...document.querySelectorAll('svg.chart text')].map(
  t => 13 * t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width);
document.querySelector('select').value = '1'; document.querySelector('select').onchange();
const examples = [...document.querySelector('.examples').querySelectorAll('article')];
parent.postMessage(JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth, type: Math.min(...sizes),
  shown: examples.filter(a => !a.hidden && a.dataset.right === '0').length,
  selects: document.querySelectorAll('select').length,
  back: getComputedStyle(document.body).backgroundColor}), '*')</script>"""


PHONE = """<title></title><script>onmessage = e => document.title = e.data</script>
<iframe src="probe.html" style="width: 390px; height: 800px; border: 0"></iframe>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone(files, tmp_path, dark):
    report(files, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    (tmp_path / "probe.html").write_text(page.replace("</body>", PROBE + "</body>"))
    (tmp_path / "phone.html").write_text(PHONE)                                  # its own window is never that narrow
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000", "--enable-logging=stderr",
               "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}",
               *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    run = subprocess.run([CHROMIUM, *options, (tmp_path / "phone.html").as_uri()], capture_output=True, text=True,
                         timeout=120)
    assert "CONSOLE" not in run.stderr, run.stderr
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout)[1]))
    assert seen["page"] <= seen["window"] == 390 and seen["type"] > 12 and seen["shown"] == 0 and seen["selects"] == 4
    assert (seen["back"] == "rgb(23, 25, 28)") == dark
