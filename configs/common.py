"""The paper's setting that every config here shares, and its experiments: they start from it and change their own part.

    sami run --config=configs/common.py --workdir=runs/mine --config.model=... --config.queries.train=... \\
        --config.queries.evaluation=... --config.constitutions.principles=...

Hardware, duration, expected: those of the model that you name; configs/mistral_7b.py is an example.
Fields left out keep their defaults, which `sami run --help` lists with their meaning.
"""

import os
import pathlib

import ml_collections

HERE = pathlib.Path(__file__).parent


def get_config() -> ml_collections.ConfigDict:
    """The paper's setting: three iterations of 2, 4 and 6 steps of 128 queries."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.iterations = 3
    config.train = ml_collections.ConfigDict()
    config.train.steps = (2, 4, 6)
    config.train.queries_per_step = 128
    return config


def add_experiment(config: ml_collections.ConfigDict, name: str) -> None:
    """Adds queries, constitutions and prompts of one of the paper's experiments (docs/data.md), in our own wording.

    Args:
      config: gets them.
      name: "summaries" (section 4.2), "dialogue_helpful" or "dialogue_harmless" (4.1), "diverse" or "diverse_reasoning"
        (4.3), or "" for queries, principles and prompts of your own.

    Raises:
      ValueError: the name is none of these.
    """
    if not name:
        return
    experiments = {
        "summaries": ("tldr", "concise_comprehensive", "authors", "summary"),
        "dialogue_helpful": ("hh_helpful", "helpful_harmless", "authors", "dialogue"),
        "dialogue_harmless": ("hh_harmless", "helpful_harmless", "authors", "dialogue"),
        "diverse": ("tldr", "diverse", "diverse", "summary"),
        "diverse_reasoning": ("tldr", "diverse", "diverse", "summary"),
    }
    if name not in experiments:
        raise ValueError(f"unknown variant {name!r}; there are {', '.join(experiments)}")
    queries, principles, pairing, prompts = experiments[name]
    config.queries = ml_collections.ConfigDict({"train": queries, "evaluation": queries, "evaluation_count": 250})
    # A path from where the command runs, so that a run goes on in another checkout.
    file = os.path.relpath(HERE / "principles" / f"{principles}.json")
    config.constitutions = ml_collections.ConfigDict({"principles": file, "pairing": pairing})
    config.prompts = ml_collections.ConfigDict(
        {"generation": _template(f"{prompts}_generation"), "training": _template(f"{prompts}_training")}
    )
    config.sampling = ml_collections.ConfigDict({"stop": ("Human:", "###", "Constitution:", "POST:")})
    if prompts == "summary":
        config.prompts.response_prefix = "The post"
    else:
        apologies = ("I'm sorry", "I am sorry", "Sorry", "I apologize", "I cannot", "I can't")
        config.filters = ml_collections.ConfigDict({"evasive_beginnings": apologies})
    if name == "diverse_reasoning":
        config.prompts.generation = _template("summary_reasoning")
        config.prompts.response_prefix = ""  # it would begin the reasoning
        config.prompts.chain_of_thought = True
        config.prompts.answer_marker = "Summary:"
        config.sampling.max_new_tokens = 500


def _template(name: str) -> str:
    """The text itself, so that a run keeps it."""
    return (HERE / "prompts" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
