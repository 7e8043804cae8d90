"""The report of a small synthetic run: its numbers, its words, its escapes and its refusals."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from sami_jax.errors import BadDataError
from sami_jax.evaluation.results import QueryResult, write_results
from sami_jax.evaluation.statistics import Estimate, mean_with_interval, win_rate, win_scores
from sami_jax.evaluation.verdicts import Verdict
from sami_jax.report import charts
from sami_jax.report.findings import changes_from_base, headline
from sami_jax.report.measures import DISTINCT
from sami_jax.report.page import duration, write_report
from sami_jax.report.reading import read_run
from sami_jax.report.samples import constitution_posterior, samples_by_split
from sami_jax.report.tables import summary_table

PRINCIPLES = {"learned": ("tone", "greeting"), "held_out": ("source", "closing")}
WORDS = {
    "tone": ("great", "awful"),
    "greeting": ("ahoy", "hello"),
    "source": ("author", "op"),
    "closing": ("thanks", "over"),
}
ATTACK = '<script>alert("x")</script>'


def _as_json(estimate: Estimate) -> dict:
    return estimate._asdict()


def _result(rng, split: str, index: int, skill: float, malformed: float) -> dict:
    """One query under two constitutions, each principle followed with probability `skill`."""
    names = PRINCIPLES[split]
    wanted = [(0, 0), (1, 0) if index % 2 else (1, 1)]
    responses, verdicts, constitutions = [], [], []
    for signs in wanted:
        followed = {name: bool(rng.random() < skill) for name in names}
        said = [WORDS[n][s if followed[n] else 1 - s] for n, s in zip(names, signs, strict=True)]
        well_formed = bool(rng.random() >= malformed)
        responses.append(f"{said[1]}, {said[0]} news: aunt Grace sold the bike no. {index}." if well_formed else "news")
        constitutions.append(
            "\n".join(
                f"{i + 1}. The summary should say {WORDS[n][s]}."
                for i, (n, s) in enumerate(zip(names, signs, strict=True))
            )
        )
        verdicts.append(
            {
                "well_formed": well_formed,
                "faithful": bool(rng.random() < 0.96),
                "adherence": sum(followed.values()) / len(names),
                "followed": followed,
            }
        )
    contrast = 2.0 * (skill - 0.5) * sum(v["adherence"] for v in verdicts) / 2
    logps = -0.6 - rng.random((2, 2)) * 0.1 - (1 - np.eye(2)) * contrast
    over_constitutions = -np.mean(np.log(np.diag(constitution_posterior(logps))))
    return {
        "split": split,
        "example_id": f"{split}-{index}",
        "constitutions": constitutions,
        "responses": responses,
        "query": f"My aunt Grace sold the bike no. {index} on friday. I feel guilty. The weather was rainy.",
        "response_tokens": [len(r.split()) + 2 for r in responses],
        "logps": logps.round(4).tolist(),
        "mi_nats": float(np.log(2) - over_constitutions),
        "verdicts": verdicts,
    }


def _query_result(row: dict, *, judged: bool) -> QueryResult:
    verdicts = [Verdict(v["well_formed"], v["faithful"], v["followed"]) for v in row["verdicts"]] if judged else None
    logps = np.array(row["logps"])
    return QueryResult(**row | {"logps": logps, "base_logps": np.diagonal(logps) - 0.1, "verdicts": verdicts})


def _summary(iteration: int, results: list, base: list, *, judged: bool) -> dict:
    splits = {}
    for split in sorted({row["split"] for row in results}):
        rows = [row for row in results if row["split"] == split]
        base_rows = [row for row in base if row["split"] == split]

        def over(key, rows):
            return np.array([np.mean([float(v[key]) for v in row["verdicts"]]) for row in rows])

        mi, base_mi = (np.array([row["mi_nats"] for row in part]) for part in (rows, base_rows))
        entry = {
            "n_queries": len(rows),
            "n_unscored": 0,
            "mi_nats": _as_json(mean_with_interval(mi)),
            "length_tokens": _as_json(mean_with_interval([np.mean(row["response_tokens"]) for row in rows])),
            "base_logp": _as_json(mean_with_interval(-0.4 - 0.02 * iteration + 0.1 * over("adherence", rows))),
            "distinct": _as_json(mean_with_interval([len(set(row["responses"])) == 2 for row in rows])),
            "judge": "miniature" if judged else None,
            "mi_gain_nats": _as_json(mean_with_interval(mi - base_mi)) if iteration else None,
        }
        for key in ("adherence", "well_formed", "faithful"):
            entry[key] = _as_json(mean_with_interval(over(key, rows))) if judged else None
        entry |= {"win_rate": None, "strict_win_rate": None, "adherence_gain": None, "per_principle": None}
        entry |= {"win_rate_t": None, "wins": None, "losses": None, "ties": None}
        if judged:
            entry["per_principle"] = {
                name: _as_json(
                    mean_with_interval([np.mean([v["followed"][name] for v in row["verdicts"]]) for row in rows])
                )
                for name in PRINCIPLES[split]
            }
        if judged and iteration:
            won = win_rate(win_scores(over("adherence", rows), over("adherence", base_rows)))
            entry |= {
                "win_rate": _as_json(won.estimate),
                "win_rate_t": won.t,
                "wins": won.wins,
                "losses": won.losses,
                "ties": won.ties,
                "strict_win_rate": _as_json(won.estimate),
                "adherence_gain": _as_json(mean_with_interval(over("adherence", rows) - over("adherence", base_rows))),
            }
        splits[split] = entry
    return {"iteration": iteration, "normalize": "mean", "ceiling_nats": float(np.log(2)), "splits": splits}


def _write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_run(
    run_dir: Path,
    *,
    skills=(0.6, 0.72, 0.84, 0.9),
    malformed=(0.0, 0.0, 0.0, 0.0),
    n=120,
    judged=True,
    train_eos=False,
):
    """A run directory whose learned principles are followed with the given skills; held-out ones stay at 0.6."""
    _write(run_dir / "RUN.json", {"run_id": "mini-1", "config_sha256": "ab" * 32, "seed": 2, "created": "2024-05-01"})
    train = {"normalize": "mean", "kl_beta": 1.0, "train_eos": train_eos}
    _write(run_dir / "config.json", {"train": train, "name": ATTACK})
    metrics, events, base = [], [{"event": "run_started"}], []
    for k, (skill, bad) in enumerate(zip(skills, malformed, strict=False)):
        results = []
        for split, p in (("learned", skill), ("held_out", 0.6)):
            rng = np.random.default_rng([k if split == "learned" else 0, len(split)])
            results += [_result(rng, split, index, p, bad) for index in range(n)]
        results[0]["responses"][0] += ATTACK
        base = base or results
        folder = run_dir / f"iter_{k:03d}"
        _write(folder / "eval" / "summary.json", _summary(k, results, base, judged=judged))
        write_results(folder / "eval" / "results.jsonl", [_query_result(row, judged=judged) for row in results])
        if k:
            kept, dropped = 512 * k, {"identical": 301 + k, "empty": 0, "unfinished": 7}
            sampled = kept + sum(dropped.values())
            _write(
                folder / "train" / "DONE.json",
                {"counts": {"steps": 3, "rows": 8 * k, "row_tokens": 896, "real_share": 0.914}},
            )
            _write(
                folder / "sample" / "DONE.json",
                {"counts": {"queries": 4000, "sampled": sampled, "kept": kept, "dropped": dropped}},
            )
            for step in range(1, 8 * k + 1):
                mi = (0.07 + 0.01 * k) * (1 - np.exp(-step / (5 + 2 * k)))
                metrics.append(
                    {
                        "iteration": k,
                        "stage": "train",
                        "step": step,
                        "loss": 0.693 - mi,
                        "mi_nats": mi,
                        "kl": 0.002 * step,
                        "grad_norm": 1.0,
                        "share_changed": 0.9,
                        "step_time_s": 0.5,
                    }
                )
        for stage, seconds in (("sample", 21.5 * k), ("train", 40.25 * k), ("eval", 12.0)):
            if k or stage == "eval":
                events.append({"event": "stage_done", "iteration": k, "stage": stage, "seconds": seconds})
    if len(skills) > 1:
        _write(run_dir / "metrics.jsonl", metrics)
    _write(run_dir / "events.jsonl", events)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run_dir) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def _text(page: str) -> str:
    """What a reader sees: no style, no tags, single spaces."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def _h1(run_dir: Path) -> str:
    return headline(read_run(run_dir))[0]


def test_page_holds_the_exact_numbers(run_dir, page):
    learned = json.loads((run_dir / "iter_003/eval/summary.json").read_text())["splits"]["learned"]
    win = learned["win_rate"]
    shown = f"win rate {100 * win['mean']:.1f} % [{100 * win['low']:.1f}, {100 * win['high']:.1f}]"
    assert shown in re.search(r"<h1>(.*?)</h1>", page)[1]
    text = _text(page)
    assert f"{learned['wins']} / {learned['ties']} / {learned['losses']}" in text
    ts = [json.loads((run_dir / f"iter_{k:03d}/eval/summary.json").read_text())["splits"]["learned"] for k in (1, 2, 3)]
    shown = " ".join(f"{split['win_rate_t']:.2f}" for split in ts)
    assert f"t: the win rate's distance from 50 % in standard errors – {shown}" in html.unescape(text)
    distinct = learned["distinct"]
    shown = f"{100 * distinct['mean']:.1f} % [{100 * distinct['low']:.1f}, {100 * distinct['high']:.1f}]"
    assert re.search(f"Responses differ by constitution( [^R]+)? {re.escape(shown)}", text)
    mi = learned["mi_nats"]
    assert f"{mi['mean']:.3f} [{mi['low']:.3f}, {mi['high']:.3f}]" in text
    assert f"{100 * learned['per_principle']['tone']['mean']:.1f} %" in text
    assert "config_sha256" in text and "ab" * 32 in text and "train.kl_beta 1.0" in text


def test_texts_are_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert not re.search(r"\son\w+=", page)


def test_page_makes_no_requests(page):
    assert "http://" not in page and "https://" not in page
    assert not re.search(r"<(link|script|img|iframe|object|embed|base)\b|url\(|@import", page)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_same_files_give_the_same_bytes(run_dir, tmp_path):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert write_report(write_run(tmp_path / "elsewhere")).read_bytes() == first
    assert [path.name for path in (run_dir / "report").iterdir()] == ["index.html"]  # no temporary file stays


def test_tags_are_balanced(page):
    void = {"meta", "circle", "rect", "line", "path", "polyline"}
    stack = []
    for close, name, self_closed in re.findall(r"<(/?)([a-z][a-z0-9]*)[^<>]*?(/?)>", page):
        if close:
            assert stack.pop() == name
        elif name not in void and not self_closed:
            stack.append(name)
    assert stack == []


def test_funnel_counts(run_dir, page):
    text = _text(page)
    assert "sampled 821 1334 1847" in text  # 512 k + 301 + k + 7
    assert "dropped: identical 302 303 304 dropped: empty 0 0 0 dropped: unfinished 7 7 7" in text
    assert "kept 512 62.4 % of sampled 1024 76.8 % of sampled" in text  # 512 / 821, 1024 / 1334


def test_rows_of_each_training(page):
    assert "8 rows of 896 tokens at once, 91 % of them real; the rest is padding." in _text(page)
    assert "24 rows of 896 tokens at once" in _text(page)


def test_headline_follows_the_numbers(tmp_path, run_dir):
    assert "the model beats its base on the learned principles" in _h1(run_dir)
    rest = " ".join(headline(read_run(run_dir)))
    assert "There is no measurable difference from the base on the held-out principles" in rest
    assert "The share of principles followed rose on the learned principles, 57.1 → 90.6 %" in rest
    assert "; it did not change measurably on the held-out principles, 62.3 → 62.3 %" in rest
    assert "The likelihood of the responses under the base fell on the learned principles" in rest

    worse = write_run(tmp_path / "worse", skills=(0.9, 0.6))
    assert "After 1 iteration, the model loses to its base on the learned principles" in _h1(worse)
    assert "The share of principles followed fell on" in " ".join(headline(read_run(worse)))

    same = write_run(tmp_path / "same", skills=(0.6, 0.6))
    assert "there is no measurable difference from the base on the learned principles" in _h1(same)


def _with_learned(run_dir: Path, iteration: int = 1, **fields) -> Path:
    path = run_dir / f"iter_{iteration:03d}/eval/summary.json"
    summary = json.loads(path.read_text())
    summary["splits"]["learned"] |= fields
    _write(path, summary)
    return run_dir


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.5001, 0.7, "beats its base"),
        (0.5, 0.7, "no measurable difference"),
        (0.3, 0.5, "no measurable difference"),
        (0.3, 0.4999, "loses to its base"),
        (None, None, "no measurable difference"),
    ],
)
def test_headline_turns_at_the_interval(tmp_path, low, high, words):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.6), n=8)
    assert words in _h1(_with_learned(run_dir, win_rate={"mean": 0.5, "low": low, "high": high, "n": 8}))


def test_rising_information_without_wins_is_called_no_improvement(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.6), n=8)
    _with_learned(
        run_dir,
        win_rate={"mean": 0.5, "low": 0.4, "high": 0.6, "n": 8},
        mi_gain_nats={"mean": 0.2, "low": 0.1, "high": 0.3, "n": 8},
    )
    assert "By itself that is no improvement: the judge saw none." in " ".join(headline(read_run(run_dir)))


def test_a_fall_in_form_is_a_warning(tmp_path, run_dir):
    assert "Warning: well-formed" not in " ".join(headline(read_run(run_dir)))
    broken = write_run(tmp_path / "run", skills=(0.6, 0.9), malformed=(0.0, 0.3))
    sentences = headline(read_run(broken))
    assert any(s.startswith("Warning: well-formed responses fell on the learned principles, 100.0") for s in sentences)
    assert "No fall in form" not in " ".join(sentences)


@pytest.mark.parametrize("key", ["well_formed", "faithful"])
@pytest.mark.parametrize(("share", "is_low"), [(0.8, True), (0.81, False)])
def test_a_base_of_poor_form_or_content_is_a_warning(tmp_path, key, share, is_low):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.9), n=8)
    estimate = {"mean": share, "low": share - 0.1, "high": share + 0.1, "n": 8}
    for iteration in (0, 1):
        _with_learned(run_dir, iteration, **{key: estimate})
    sentences = headline(read_run(run_dir))
    label = {"well_formed": "well-formed responses", "faithful": "content copied rightly"}[key]
    warning = f"Warning: the share of {label} was low in the base already on the learned principles, 80.0 → 80.0 %"
    assert any(s.startswith(warning) for s in sentences) == is_low
    assert ("No fall in form or content was measured." in sentences) != is_low


def test_distinct_responses_are_compared_query_by_query(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.6), n=8)
    for iteration, same in ((0, ()), (1, (0, 1))):  # of 8 queries, two lose the difference: -2/8
        path = run_dir / f"iter_{iteration:03d}/eval/results.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            index = int(row["example_id"].split("-")[1])
            row["responses"] = ["a", "a"] if row["split"] == "learned" and index in same else ["a", "b"]
        _write(path, rows)
    gains = {c.split: c.gain for c in changes_from_base(read_run(run_dir)) if c.metric is DISTINCT}
    assert (gains["learned"].mean, gains["learned"].n, gains["held_out"].mean) == (-0.25, 8, 0.0)


def test_notes_say_how_the_numbers_were_made(tmp_path):
    notes = {}
    for train_eos, normalize in ((False, "mean"), (True, "sum")):
        run_dir = write_run(tmp_path / normalize, skills=(0.6, 0.9), n=8, train_eos=train_eos)
        path = run_dir / "iter_001/eval/summary.json"
        _write(path, json.loads(path.read_text()) | {"normalize": normalize})
        run = read_run(run_dir)
        drawn = charts.iteration_charts(run) + charts.training_charts(run)
        notes[normalize] = {chart.title: chart.note for chart in drawn}
    title = "Mutual information (nats)"  # the training chart's too, which comes last
    assert notes["mean"][title] == "The same lower bound as in the evaluation, on the training batch."
    assert "on the training batch, end of sequence included" in notes["sum"][title]
    for normalize in notes:
        assert f"Log-probability, {normalize} over tokens." in notes[normalize]["Likelihood under the base"]


def test_a_run_from_before_t_was_written_can_be_read(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.9), n=8)
    for path in run_dir.glob("iter_*/eval/summary.json"):
        summary = json.loads(path.read_text())
        for split in summary["splits"].values():
            del split["win_rate_t"]
        _write(path, summary)
    assert "standard errors" not in write_report(run_dir).read_text(encoding="utf-8")


def test_base_only(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6,))
    text = _text(write_report(run_dir).read_text())
    assert "Only the base model has been evaluated so far, so nothing can be said yet about SAMI." in text
    assert "No training step has been recorded yet." in text and "No iteration has sampled" in text
    assert "Curves appear once" in text and "beats" not in text and "Before and after" not in text


def test_without_a_judge(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.9), judged=False)
    text = _text(write_report(run_dir).read_text())
    assert "no win rate: there was no judge" in text and "Form and content were not judged." in text
    assert "not judged" in text and "Principle by principle" not in text


def test_an_empty_response_has_no_scores(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.9), n=8)
    _with_learned(run_dir, n_unscored=1)
    path = run_dir / "iter_001/eval/results.jsonl"
    first, *rest = (json.loads(line) for line in path.read_text().splitlines())
    first["responses"][0] = ""
    _write(path, [first | {"logps": None, "base_logps": None, "mi_nats": None}, *rest])
    text = _text(write_report(run_dir).read_text())
    assert "(empty)" in text and "iteration 1: a response is empty, so it has no log-probability." in text
    assert "Queries with an empty response, without mutual information and likelihood 0 1" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RUN.json", "RUN.json does not exist"),
        ("config.json", "config.json does not exist"),
        ("iter_000/eval/summary.json", "no evaluation of its base"),
        ("iter_001/eval/results.jsonl", "iter_001/eval/results.jsonl does not exist"),
    ],
)
def test_missing_files_are_named(tmp_path, name, words):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.7), n=8)
    (run_dir / name).unlink()
    with pytest.raises(BadDataError, match=words):
        write_report(run_dir)
    assert not (run_dir / "report").exists()


def test_malformed_files_are_named(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.7), n=8)
    with pytest.raises(BadDataError, match=r"iter_001/eval/summary\.json, line 1: NaN is no finite number"):
        write_report(_with_learned(run_dir, mi_nats={"mean": float("nan"), "low": 0, "high": 1, "n": 8}))
    with pytest.raises(BadDataError, match=r"iter_001/eval/summary\.json .*unexpected keyword argument 'sd'"):
        write_report(_with_learned(run_dir, mi_nats={"mean": 0.5, "sd": 1, "n": 8}))

    run_dir = write_run(tmp_path / "config", skills=(0.6,), n=8)
    _write(run_dir / "config.json", {"train": {}})
    with pytest.raises(BadDataError, match=r"config\.json .*KeyError: 'train_eos'"):
        write_report(run_dir)

    run_dir = write_run(tmp_path / "lengths", skills=(0.6,), n=8)
    path = run_dir / "iter_000/eval/results.jsonl"
    first, *rest = (json.loads(line) for line in path.read_text().splitlines())
    _write(path, [first | {"responses": ["one"]}, *rest])
    with pytest.raises(BadDataError, match=r"results\.jsonl, entry 1 is not as a run .*learned-0 has not one value"):
        write_report(run_dir)

    run_dir = write_run(tmp_path / "order", skills=(0.6, 0.7), n=8)
    path = run_dir / "iter_001/eval/results.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(BadDataError, match="another order"):
        write_report(run_dir)


def test_the_last_line_of_a_step_wins_and_a_torn_one_is_left_out(tmp_path):
    run_dir = write_run(tmp_path / "run", skills=(0.6, 0.7), n=8)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"iteration": 1, "stage": "train", "step": 2, "loss": 0.125, "mi_nats": 0.5, "kl": 0}) + "\n"
        )
        file.write('{"iteration": 1, "stage": "train", "st')
    steps = read_run(run_dir).train_steps[1]
    assert [step.step for step in steps] == list(range(1, 9))
    assert steps[1].loss == 0.125


def test_samples_follow_the_rule(run_dir):
    groups = samples_by_split(read_run(run_dir))
    for group in groups.values():
        shown = [int(sample.base.example_id.split("-")[1]) for sample in group]
        assert shown[:6] == [0, 1, 2, 3, 4, 5] and shown == sorted(shown)
        assert [sample.is_changed for sample in group] == [False] * 6 + [True] * (len(shown) - 6)
    assert len(groups["learned"]) == 10
    assert len(groups["held_out"]) == 6  # the synthetic held-out answers never change


def test_constitution_posterior_by_hand():
    # column 0: e^0 / (e^0 + e^-log 3) = 1 / (1 + 1/3) = 0.75; column 1 is even
    posterior = constitution_posterior(np.array([[0.0, -2.0], [-np.log(3), -2.0]]))
    np.testing.assert_allclose(posterior, [[0.75, 0.5], [0.25, 0.5]])
    np.testing.assert_allclose(constitution_posterior(np.array([[-5000.0], [-5001.0]])).sum(), 1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.61, 0.693, [0.6, 0.625, 0.65, 0.675, 0.7]),
        (-3.0, 9.0, [-5, 0, 5, 10]),
        (2.0, 2.0, [2.0, 2.5]),
        (-4e-11, 0.03, [0, 0.01, 0.02, 0.03]),
    ],
)
def test_nice_ticks(low, high, expected):
    ticks = charts.nice_ticks(low, high)
    np.testing.assert_allclose(ticks, expected)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high


def test_charts_stay_inside_their_frame(run_dir):
    run = read_run(run_dir)
    for chart in charts.iteration_charts(run) + charts.training_charts(run):
        for series in chart.series:
            for mark in series.marks:
                assert charts.LEFT <= mark.x <= charts.WIDTH - charts.RIGHT
                assert charts.TOP <= mark.y <= charts.HEIGHT - charts.BOTTOM


def test_durations():
    assert [duration(s) for s in (4.24, 59.96, 185, 7620)] == ["4.2 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]


def test_summary_table(run_dir):
    lines = summary_table(run_dir).splitlines()
    assert "learned principles" in lines[0] and "held-out principles" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["base", "1", "2", "3"]
    win = json.loads((run_dir / "iter_003/eval/summary.json").read_text())["splits"]["learned"]["win_rate"]
    assert f"{100 * win['mean']:.1f} +-{50 * (win['high'] - win['low']):.1f}" in lines[-1]
    assert len({len(line) for line in lines[1:]}) == 1 and lines[2].split()[2] == "-"
