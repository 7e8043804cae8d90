"""The stage that compares two models' responses: a judge's verdicts on pairs, and the win rate they come to."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from sami_jax.chat.opening import make_chat, open_answers
from sami_jax.config.chat import FREE
from sami_jax.config.evaluation import EvaluationConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.run import RunConfig
from sami_jax.errors import BadDataError, SamiError
from sami_jax.evaluation.comparison import JudgedPair, detail_pairs, of_contest, of_verdicts, summarize_pairs
from sami_jax.evaluation.contests import Matched, match, read_answered
from sami_jax.evaluation.pairwise_judge import judge_contests, prompt_hash, questions_of, too_many_errors
from sami_jax.files import read_json, write_json, write_jsonl
from sami_jax.progress import Progress, say
from sami_jax.safe_point import SafePoint
from sami_jax.stage_folder import check_sealed
from sami_jax.stages.stage import Output, Source, Stage, no_input, settings_but
from sami_jax.types import Dtype

SUMMARY, DETAILS, VERDICTS = "summary.json", "details.json", "verdicts.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(Stage):
    """A policy's responses against a baseline's.

    Attributes:
      responses: the policy's: a results.jsonl, or a file in the authors' format.
      baseline: the other's.
      split: of a results.jsonl, "learned" or "held_out"; "" for both together.
      kind: what the judge is: "asked" through a chat, or a "program", whose verdicts stand in both files.
      evaluation: the judge.
      given: the folder of its model, or the file of its recorded answers; None for a server and for a program.
      prompt_sha256: of the template that it is asked by.
      seed: of the orders where one is drawn.
      compute_dtype: of the activations and matmuls of a model on these devices.
      mesh: those devices.
      log: keeps its answers, and is no input: what is there already is not asked again.
    """

    name = "judge"
    outside = "answers"

    responses: Source
    baseline: Source
    split: str
    kind: Literal["asked", "program"]
    # The judge's model or record is a field of its own; what else is evaluated does not matter here.
    evaluation: EvaluationConfig = settings_but("judge", "held_out", "instruct", *FREE)
    given: Source | None
    prompt_sha256: str
    seed: int
    compute_dtype: Dtype
    mesh: MeshConfig
    log: Path = no_input()

    @classmethod
    def of(
        cls, config: RunConfig, *, responses: Source, baseline: Source, split: str, given: Source | None, log: Path
    ) -> "Judge":
        """The stage with a config's settings."""
        return cls(
            responses=responses,
            baseline=baseline,
            split=split,
            kind="asked" if config.evaluation.is_asked else "program",
            evaluation=config.evaluation,
            given=given,
            prompt_sha256=prompt_hash(),
            seed=config.seed,
            compute_dtype=config.compute_dtype,
            mesh=config.mesh,
            log=log,
        )

    def make(self, out: Output, safe_point: SafePoint) -> Any:
        """Makes `verdicts.jsonl`, `summary.json` and `details.json`; see `Stage.make`.

        Where a few questions have no answer, the stage is left open: the next attempt asks them again.

        Raises:
          BadConfigError: the budget is spent, or nobody can be asked.
          BadDataError: the files have nothing in common or were not judged, or the judge says nothing that can be used.
          UnavailableError: more than 5 % of the questions have no answer.
        """
        matched = self.matched()
        if self.kind == "program":
            out.begin()
            self._write(
                out, matched, [of_verdicts(pairing) for pairing in matched.pairings], 0.0, self.evaluation.judge
            )
        else:
            self._ask(out, matched, safe_point)
        return {"pairs": len(matched.pairings)}

    def matched(self) -> Matched:
        """The two files' pairs. Raises BadDataError as `make`."""
        if self.split and all(source.path.suffix != ".jsonl" for source in (self.responses, self.baseline)):
            raise BadDataError(
                f"{self.responses.path} and {self.baseline.path} have no splits, as a results.jsonl has; leave out "
                "--split."
            )
        ours, theirs = (read_answered(source.path, split=self.split) for source in (self.responses, self.baseline))
        matched = match(ours, theirs, files=(self.responses.path, self.baseline.path))
        if self.kind == "program":
            for one in (row for pairing in matched.pairings for row in pairing):
                if one.verdict is None:
                    raise BadDataError(
                        f"{one.name} was evaluated without a judge; evaluate both models with "
                        f"config.evaluation.judge={self.evaluation.judge} first, or have a language model judge."
                    )
        return matched

    def _ask(self, out: Output, matched: Matched, safe_point: SafePoint) -> None:
        evaluation, config = self.evaluation, self.evaluation.chat
        given = self.given.path if self.given else None
        chat = make_chat(config, given, mesh=self.mesh, compute_dtype=self.compute_dtype, say=say)
        out.begin()
        names, contests = [], []
        for pairing in matched.pairings:
            of_one = pairing.contests(per_principle=evaluation.per_principle)
            names += [pairing.ours.name] * len(of_one)
            contests += of_one
        how: dict[str, Any] = {"orders": evaluation.orders, "seed": self.seed}
        progress = Progress("judging", 0, unit="questions")
        with open_answers(config, chat, self.log, safe_point=safe_point, say=say) as answers:
            try:
                judged = judge_contests(answers, contests, **how, progress=progress)
            except SamiError:
                if answers.log_is_empty:  # so that the mended command may ask somebody else in the same place
                    out.withdraw()
                raise
            cost_usd = answers.cost_usd(questions_of(contests, **how))
        pairs = [
            of_contest(name, one, per_principle=evaluation.per_principle)
            for name, one in zip(names, judged, strict=True)
        ]
        self._write(out, matched, pairs, cost_usd, chat.name)
        if problem := too_many_errors(chat.name, judged):
            raise problem
        if any(one.outcome == "error" for one in judged):
            out.leave_open()

    def _write(self, out: Output, matched: Matched, pairs: list[JudgedPair], cost_usd: float, judge: str) -> None:
        about = {
            "judge": judge,
            "judge_model": self.evaluation.judge_model or (self.given.fingerprint if self.given else None),
            "prompt_sha256": self.prompt_sha256 if self.kind == "asked" else None,
            "orders": self.evaluation.orders if self.kind == "asked" else None,
            "per_principle": self.evaluation.per_principle,
            "split": self.split or None,
        }
        out.write(VERDICTS, write_jsonl, [dataclasses.asdict(pair) for pair in pairs])
        out.write(DETAILS, _write_in_order, out.alone(lambda: about | detail_pairs(pairs, matched)))
        out.write(SUMMARY, _write_in_order, out.alone(lambda: summarize_pairs(pairs, cost_usd=cost_usd)))


def _write_in_order(path: Path, value: Any) -> None:
    write_json(path, value, sort_keys=False)


def read_comparison(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """summary.json and details.json of a comparison. Raises BadDataError where they were changed since."""
    check_sealed(folder)
    return read_json(folder / SUMMARY), read_json(folder / DETAILS)
