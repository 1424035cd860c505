"The report: what it says, that nothing a model wrote becomes part of the page, and that its files can be read."
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, strategies as st

from capo.report import (Code, Grid, Number, Paragraph, curves_of, draw_confidence, draw_risk, examples, in_html, in_markdown, label, named,
                         plain, report, visible)
from capo.responses import shorten
from capo.vote import majority_vote, most_confident
from helpers import responses, two_runs

EVIL = "<script>alert('9')</script><img src=x onerror=alert(1)> | `a` ``` \n\n# head $x$ \u202e\x00\ud800 **b** &amp; [l](javascript:1) ]]> </pre></article>"


def rows(r, text=lambda q, g: f"text {q} {g}", **other):
    return [{"id": r.id[q], "prompt": f"q{q}", "response": text(q, g), "answer": r.answer[q][g], "correct": bool(r.correct[q, g]), "lpm": r.lpm[q, g].item()} | other for q in range(len(r)) for g in range(r.lpm.shape[1])]


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

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text += data


def test_the_folder_of_a_report(files, tmp_path):
    made = report(files, tmp_path / "out", n=20)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["auc.png", "confidence.png", "report.html", "report.md", "risk_coverage.png", "summary.json", "votes.png"]
    assert all((out / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in ("auc", "confidence", "risk_coverage", "votes"))
    text, page = (out / "report.md").read_text(), Page((out / "report.html").read_text())
    assert all(f"]({n}.png)" in text for n in ("auc", "confidence", "risk_coverage", "votes")) and "`grpo`" in text and "`capo`" in text
    assert ("name", "viewport") in page.attributes and "script" not in page.tags and "link" not in page.tags
    sources = [v for k, v in page.attributes if k == "src"]
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources) and not [v for k, v in page.attributes if k == "href"]
    style = (out / "report.html").read_text()
    assert "prefers-color-scheme: dark" in style and "http" not in style
    said = str(made)
    assert "| AUC-mean " in said and "questions shared" in said and "alert" not in said and "text 0 0" not in said


def test_the_summary_is_strict_json(files, tmp_path):
    write(files[0], rows(two_runs(5, 3)[0], correct=True))             # one class: numbers that are not there
    report(files, tmp_path / "out", n=20)
    def refuse(x): raise AssertionError(x)
    summary = json.loads((tmp_path / "out/summary.json").read_text(), parse_constant=refuse)
    assert summary["sets"]["grpo"]["numbers"]["auc_mean"] == {"value": None, "low": None, "high": None, "note": "all responses are right"}
    assert summary["sets"]["capo"]["numbers"]["accuracy"]["value"] == pytest.approx(two_runs(12, 4)[1].correct.double().mean().item())
    assert summary["sets"]["capo"]["counts"]["questions"] == 12 and summary["differences"]["capo"]["shared"] == 5


def test_the_same_files_give_the_same_report(files, tmp_path):
    for name in ("a", "b"): report(files, tmp_path / name, n=20)
    for p in (tmp_path / "a").iterdir(): assert p.read_bytes() == (tmp_path / "b" / p.name).read_bytes(), p.name


def test_what_a_model_wrote_stays_text(tmp_path):
    r = two_runs(6, 3)[0]
    path = write(tmp_path / "a<b>&$_$.jsonl", rows(r, lambda q, g: EVIL + str(g), prompt=EVIL, answer=EVIL, reference=EVIL) + [{"id": "<script>"}])
    made = report(path, tmp_path / "out", n=5)
    page = Page((tmp_path / "out/report.html").read_text())
    assert not {"script", "b"} & set(page.tags) and [k for k, _ in page.attributes if k.startswith("on")] == []
    assert page.text.count("<script>alert('9')</script>") >= 6 and "onerror=alert(1)" in page.text and page.tags.count("img") == 4
    for text in (page.text, (tmp_path / "out/report.md").read_text(), str(made)): assert "\u202e" not in text and "\x00" not in text
    assert made._repr_html_().count("<article>") == page.tags.count("article") >= 2


@given(st.text(max_size=40))
def test_html_shows_any_text_and_has_no_other_tag(text):
    for x, tags in ((text, []), (Code(text), ["code"])):
        page = Page(in_html(x))
        assert page.tags == tags and page.text.replace("\r\n", "\n").replace("\r", "\n") == visible(text)
    assert "<" not in in_html(Number(text)).replace("<small>", "").replace("</small>", "")


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
    assert Grid([["", Code("a|b")], ["accuracy", Number("0.5 [0.4, 0.6]")]]).markdown() == (
        "|          | `a\\|b`         |\n|----------|----------------|\n| accuracy | 0.5 [0.4, 0.6] |")
    assert Grid([["x"], [Number("0.5 [0.4, 0.6]")]]).html().count("<small>[0.4, 0.6]</small>") == 1
    assert Paragraph(["of ", Code("a"), " and b"]).markdown() == "of `a` and b"


def test_shortening_keeps_both_ends():
    assert shorten("abc", 3) == "abc" and shorten("a" * 50 + "b" * 50, 10) == "aaa … bbbbbbb"
    assert visible("a\tb\nc\x1b[31m\u202ed") == "a\tb\nc\ufffd[31m\ufffdd"


def test_names_in_a_figure_are_text(tmp_path):
    r = two_runs(4, 3)[0]
    for name in ("$x$", "_hidden", "$", "a\nb", "é" * 99, "\\frac{"): assert draw_confidence({name: r}).png and draw_risk({name: r}).png
    assert label("_x")[0] != "_" and len(label("é" * 99)) < 40


def test_names_of_files(tmp_path, files):
    r = two_runs(4, 3)[0]
    assert list(named(files)) == ["grpo", "capo"] and list(named(r)) == ["responses 1"] and list(named({"x": files[0], "y": r})) == ["x", "y"]
    other = write(tmp_path / "grpo.jsonl", rows(r))
    assert list(named([files[0], other])) == [str(files[0]), str(other)]
    with pytest.raises(ValueError, match="different files"): named([files[0], files[0]])
    with pytest.raises(ValueError, match="one or several"): named([])


def test_examples_are_the_surprises_each_once():
    lpm = torch.tensor([[-.1, -.2, -.3, -.4], [-.1, -.15, -.8, -.9]])
    r = responses(lpm, torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]), torch.ones(2, 4).bool())
    confidence = lambda right: [float(re.search(r"confidence ([\d.]+)", Paragraph(e.about).markdown())[1]) for e in examples(r, right, 3)]
    assert confidence(False) == [.905, .905, .861] and confidence(True) == [.407, .449, .741]
    same = responses(lpm * 0 - 1, torch.zeros(2, 4), torch.ones(2, 4).bool())
    assert len(examples(same, False)) == 2 and examples(same, True) == []


def test_the_curves_end_at_the_votes_themselves():
    r = two_runs(10, 4)[0]
    curves = curves_of(r)
    assert all(n == [1, 2, 4] for n, _ in curves.values()) and "DeepConf" not in curves
    ends = {"majority": majority_vote(r.group, r.correct), "most confident": most_confident(r.lpm, r.correct), "any is right": r.correct.any(1).double()}
    for k, v in ends.items(): assert curves[k][1][-1] == pytest.approx(v.mean().item(), abs=1e-6)
    accuracy = r.correct.double().mean().item()
    assert curves["one at random"][1] == pytest.approx([accuracy] * 3) and curves["most confident"][1][0] == pytest.approx(accuracy)


def test_flaws_are_shown_and_counted(tmp_path):
    path = write(tmp_path / "r.jsonl", rows(two_runs(4, 3)[0]) + [{"id": 1}] * 30)
    made = report(path, tmp_path / "out", n=5)
    assert "Lines that could not be used: 30." in str(made) and f"{path}, line 13: it has neither lpm nor logps" in str(made) and "30 in all" in str(made)
    assert json.loads((tmp_path / "out/summary.json").read_text())["sets"]["r"]["counts"]["refused lines"] == 30


def test_responses_with_everything(tmp_path):
    g = torch.Generator().manual_seed(0)
    extra = lambda r: [row | {"token_confidence": [float(x) for x in torch.rand(3, generator=g)], "length": 3 + i % 5, "truncated": i % 7 == 0} for i, row in enumerate(rows(r))]
    made = report(write(tmp_path / "r.jsonl", extra(two_runs(8, 4)[0])), n=20)
    assert "Not available" not in str(made) and "| DeepConf of n " in str(made)


def test_one_question_and_one_class(tmp_path):
    for right in (True, False):
        said = str(report(write(tmp_path / "r.jsonl", [{"id": 1, "lpm": -.5, "correct": right}]), tmp_path / "out", n=5))
        assert f"all responses are {'right' if right else 'wrong'}" in said and "no response has an answer to vote for" in said


def test_runs_on_other_questions_stand_side_by_side_without_a_difference(files, tmp_path):
    write(files[1], rows(two_runs(3, 3)[0], id="other"))
    made = report(files, n=5)
    assert made.summary["differences"] == {} and "minus the first" not in str(made)


def test_plain():
    assert plain({"a": [1, math.nan, (math.inf, "x")], 2: None}) == {"a": [1, None, [None, "x"]], "2": None}
