"""Settings: every mistake is refused with the field, the value and the remedy; the configs in the repository load."""

import ast
import dataclasses
import json
import math
import pathlib
import textwrap
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from sami_jax.config.fields import describe_fields, to_dict
from sami_jax.config.run import PRETRAINED, RunConfig, check_training, from_dict, load_config
from sami_jax.errors import BadConfigError
from sami_jax.huggingface.folder import read_config
from sami_jax.miniature import world
from sami_jax.miniature.pretraining import base_shape
from sami_jax.model.decoder import abstract_params
from sami_jax.run.opening import check_constitutions
from sami_jax.sharding import AXES, make_mesh, param_shardings

ROOT = pathlib.Path(__file__).parents[1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"trian": {}}, "Unknown setting config.trian; did you mean config.train?"),
            ({"train": {"learning_rat": 1.0}}, "did you mean config.train.learning_rate?"),
            ({"qqqqqq": 1}, "Unknown setting config.qqqqqq; there are: seed, model"),
            ({"train": 3}, "config.train is a section of settings, not a value: 3"),
            ({"seed": "1"}, "config.seed is '1'; it must be a whole number"),
            ({"seed": 1.0}, "config.seed is 1.0; it must be a whole number"),
            ({"seed": True}, "config.seed is True; it must be a whole number"),
            ({"evaluation": {"held_out": 1}}, "config.evaluation.held_out is 1; it must be true or false"),
            ({"train": {"eps": "small"}}, "config.train.eps is 'small'; it must be a number"),
            ({"train": {"steps": 2}}, "config.train.steps is 2; it must be a list of whole numbers"),
            ({"train": {"steps": [2, 4.0, 6]}}, "config.train.steps is [2, 4.0, 6]; it must be"),
            ({"sampling": {"stop": "###"}}, "config.sampling.stop is '###'; it must be a list of texts"),
            ({"model": None}, "config.model is None; it must be text"),
            ({"iterations": 0}, "config.iterations is 0; it must be at least 1"),
            ({"train": {"learning_rate": 0.0}}, "config.train.learning_rate is 0.0; it must be above 0"),
            ({"train": {"learning_rate": float("nan")}}, "config.train.learning_rate is nan; it must be finite"),
            ({"train": {"kl_beta": float("inf")}}, "config.train.kl_beta is inf; it must be finite"),
            ({"train": {"eps": 10**400}}, "config.train.eps is 1000"),
            ({"train": {"steps": [2, 4, 10**30]}}, "config.train.steps is a number of 31 digits; it must fit 64 bits"),
            ({"seed": -(2**63) - 1}, "config.seed is a number of 19 digits; it must fit 64 bits"),
            ({"model": "half \ud83d"}, "config.model is 'half \\ud83d', which is no text"),
            ({"sampling": {"stop": ["\udcff"]}}, "config.sampling.stop is ('\\udcff',), which is no text"),
            ({"train": {"optimizer": "adam"}}, "config.train.optimizer is 'adam'; choose one of adamw, rmsprop"),
            ({"train": {"normalize": "max"}}, "config.train.normalize is 'max'; choose one of mean, sum"),
            ({"constitutions": {"count": 1}}, "config.constitutions.count is 1; it must be at least 2"),
            ({"prompts": {"training": "{query}"}}, "prompts.training must contain {constitution} exactly once"),
            (
                {"prompts": {"generation": "{query}{query}{constitution}"}},
                "prompts.generation must contain {query} exactly once",
            ),
            ({"prompts": {"boundary": "joint"}}, "config.prompts.boundary is 'joint'; choose one of exact, authors"),
            (
                {
                    "prompts": {
                        "generation": "{constitution}{query}Summary: ",
                        "training": "{constitution}{query}Summary:",
                    }
                },
                "config.prompts.generation ends in ' ', but config.prompts.training in ''",
            ),
            (  # what the query ends in is not known yet
                {"prompts": {"generation": "{constitution}{query}", "training": "{constitution}{query}:"}},
                "config.prompts.generation ends in '{query}', but config.prompts.training in ''",
            ),
            (
                {"train": {"over_responses_weight": 0.0, "over_constitutions_weight": 0}},
                "config.train.over_responses_weight and over_constitutions_weight are both 0",
            ),
            (
                {"constitutions": {"count": 5}},
                "config.constitutions.count is 5, but 2 principles per query have 4 sign patterns; lower it, or raise "
                "config.constitutions.principles_per_query",
            ),
            (
                {"constitutions": {"principles_per_query": 40}},
                "config.constitutions.principles_per_query is 40; it must be at most 16",
            ),
            ({"model": "gs://b/x"}, "config.model: gs://b/x is no local path; mount the store"),
            ({"queries": {"train": "s3://b/x"}}, "config.queries.train: s3://b/x is no local path"),
            ({"pretraining": {"cache_dir": "gs://b/x"}}, "config.pretraining.cache_dir: gs://b/x is no local path"),
            ({"sampling": {"stop": ("###", "")}}, "config.sampling.stop holds an empty text"),
            ({"filters": {"placeholders": ("",)}}, "config.filters.placeholders holds an empty text"),
            ({"train": {"adam_b1": 1.0}}, "config.train.adam_b1 is 1.0; it must be below 1"),
            ({"train": {"adam_b2": 1.0}}, "config.train.adam_b2 is 1.0; it must be below 1"),
            ({"train": {"rmsprop_decay": 1.5}}, "config.train.rmsprop_decay is 1.5; it must be below 1"),
            ([1], "config is a section of settings, not a value: [1]"),
        ],
    )
    def test_names_field_value_and_remedy(self, settings, message):
        with pytest.raises(BadConfigError) as caught:
            from_dict(settings)
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"iterations": 4}, "train.steps is (2, 4, 6): it needs a positive number of steps for each iteration (4)"),
            ({"train": {"steps": (2, 0, 6)}}, "config.train.steps is (2, 0, 6)"),
        ],
    )
    def test_what_does_not_fit_a_training_is_refused_where_there_is_one(self, settings, message):
        config = from_dict(settings)
        with pytest.raises(BadConfigError) as caught:
            check_training(config, iterations=config.iterations)
        assert message in str(caught.value)
        check_training(RunConfig(), iterations=3)

    def test_every_limit_of_every_number_is_enforced(self):
        checked = 0
        for section in dataclasses.fields(RunConfig):
            fields = dataclasses.fields(section.type) if dataclasses.is_dataclass(section.type) else [section]
            for field in fields:
                for key, offset in (("at_least", -1), ("above", 0), ("below", 0)):
                    limit = field.metadata.get(key)
                    if limit is not None:
                        value = field.type(limit + offset)
                        settings = {field.name: value} if field is section else {section.name: {field.name: value}}
                        with pytest.raises(BadConfigError, match=f"{field.name} is {value}"):
                            from_dict(settings)
                        checked += 1
        assert checked > 30

    def test_numbers_on_their_limits_are_fine(self):
        config = from_dict({"train": {"kl_beta": 0, "passes": 1, "steps": [1, 1, 1]}, "constitutions": {"count": 2}})
        assert (config.train.kl_beta, config.train.passes, config.train.steps) == (0.0, 1.0, (1, 1, 1))
        assert type(config.train.kl_beta) is float  # so that a run's config.json is the same for 0 and 0.0


class TestRoundTrip:
    def test_defaults(self):
        assert from_dict({}) == RunConfig()
        assert from_dict(to_dict(RunConfig())) == RunConfig()

    def test_through_json_with_every_field_changed(self):
        config = load_config(str(ROOT / "configs" / "miniature.py"))
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config != RunConfig()

    def test_values_are_those_that_json_gives_back(self):
        # A run compares its settings with those in its config.json.
        plain = to_dict(RunConfig())
        assert json.loads(json.dumps(plain)) == plain

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            RunConfig().train.eps = 1.0


class TestOverrides:
    def test_are_read_as_their_fields_type(self):
        overrides = {
            "seed": "7",
            "model": "7",
            "train.learning_rate": "1e-6",
            "train.kl_beta": "2",
            "train.remat": "dots",
            "evaluation.held_out": "False",
            "train.steps": "(1, 2, 3)",
            "train.normalize": "sum",
            "sampling.stop": "['a', 'b']",
        }
        config = load_config(None, overrides)
        assert (config.seed, config.model) == (7, "7")
        assert (config.train.learning_rate, config.train.kl_beta, config.train.remat) == (1e-6, 2.0, "dots")
        assert config.evaluation.held_out is False
        assert (config.train.steps, config.train.normalize) == ((1, 2, 3), "sum")
        assert config.sampling.stop == ("a", "b")

    def test_win_over_the_file_and_leave_the_rest(self):
        file = str(ROOT / "configs" / "miniature.py")
        changed, plain = load_config(file, {"train.kl_beta": "0.25"}), load_config(file)
        assert changed.train == dataclasses.replace(plain.train, kl_beta=0.25)
        assert dataclasses.replace(changed, train=plain.train) == plain

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("trian.steps", "(1,)", "did you mean config.train?"),
            ("seed", "1.5", "config.seed is '1.5'; it must be a whole number"),
            ("seed", "", "config.seed is ''; it must be a whole number"),
            ("evaluation.held_out", "yes", "it must be true or false"),
            ("train.remat", "True", "config.train.remat is 'True'; choose one of none, dots, full"),
            ("train.weights", "float16", "choose one of float32, bfloat16_stochastic, bfloat16"),
            ("compute_dtype", "float16", "config.compute_dtype is 'float16'; choose one of float32, bfloat16"),
            ("train.steps", "(1", "it must be a list of whole numbers"),
            ("train.steps", "{[]: 1}", "it must be a list of whole numbers"),
            ("train.steps", "__import__('os')", "it must be a list of whole numbers"),
            ("train.eps", "nan", "it must be finite"),
            ("train", "3", "config.train is a section"),
            ("seed.deep", "3", "seed is a value, not a section"),
        ],
    )
    def test_refusals(self, name, text, message):
        with pytest.raises(BadConfigError) as caught:
            load_config(None, {"seed": "1", name: text} if name == "seed.deep" else {name: text})
        assert message in str(caught.value)


class TestFiles:
    def write(self, folder, source: str) -> str:
        path = folder / "mine.py"
        path.write_text(textwrap.dedent(source))
        return str(path)

    def test_an_argument_reaches_get_config(self, tmp_path):
        file = self.write(
            tmp_path,
            """
            import ml_collections

            def get_config(variant="plain"):
                return ml_collections.ConfigDict({"model": variant})
            """,
        )
        assert load_config(file).model == "plain" and load_config(f"{file}:other").model == "other"

    def test_json_as_a_run_directory_keeps_it(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(to_dict(RunConfig(seed=5))))
        assert load_config(str(tmp_path / "config.json")) == RunConfig(seed=5)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("def get_config(): return 1 / 0", "mine.py: get_config failed (ZeroDivisionError"),
            ("x = 1", "mine.py: get_config failed (AttributeError"),
            ("def get_config(:", "mine.py: get_config failed (SyntaxError"),
            ("def get_config(): return 3", "mine.py: get_config returned 3; it must be a section"),
        ],
    )
    def test_a_file_that_fails_is_named(self, tmp_path, source, message):
        with pytest.raises(BadConfigError) as caught:
            load_config(self.write(tmp_path, source))
        assert message in str(caught.value)

    def test_a_plain_dictionary_will_do(self, tmp_path):
        assert load_config(self.write(tmp_path, "def get_config(): return {'seed': 3}")).seed == 3

    def test_a_file_that_does_not_exist_or_is_no_config(self, tmp_path):
        with pytest.raises(BadConfigError, match="nowhere.py does not exist"):
            load_config(str(tmp_path / "nowhere.py"))
        (tmp_path / "config.yaml").write_text("seed: 1")
        with pytest.raises(BadConfigError, match=r"config.yaml is neither a .py nor a .json file"):
            load_config(str(tmp_path / "config.yaml"))
        (tmp_path / "list.json").write_text("[1]")
        with pytest.raises(BadConfigError, match="section"):
            load_config(str(tmp_path / "list.json"), {"seed": "1"})


EXPERIMENTS = {  # of the paper: queries, principles, pairing
    "mistral_7b.py:summaries": ("tldr", "concise_comprehensive.json", "authors"),
    "mistral_7b.py:dialogue_helpful": ("hh_helpful", "helpful_harmless.json", "authors"),
    "mistral_7b.py:dialogue_harmless": ("hh_harmless", "helpful_harmless.json", "authors"),
    "mixtral_8x7b.py:summaries": ("tldr", "concise_comprehensive.json", "authors"),
    "llama3_70b.py:diverse": ("tldr", "diverse.json", "diverse"),
    "llama3_70b.py:diverse_reasoning": ("tldr", "diverse.json", "diverse"),
}
VARIANTS = [str(path) for path in sorted((ROOT / "configs").glob("*.py"))] + [
    str(ROOT / "configs" / name) for name in ("miniature.py:smoke", *EXPERIMENTS)
]


class TestConfigsOfTheRepository:
    @pytest.mark.parametrize("file", VARIANTS, ids=lambda file: pathlib.Path(file).name)
    def test_loads_and_its_model_builds_abstractly(self, file):
        config = load_config(file)
        if config.pretraining.enabled:
            assert config.model.startswith(PRETRAINED)
            shape = base_shape(config.pretraining)
            assert shape.head_dim * shape.n_heads == shape.embed_dim
            shapes, axes = abstract_params(shape)
            param_shardings(make_mesh(config.mesh), shapes, axes)
            assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 1_500_000  # the miniature is for laptops

    @pytest.mark.parametrize(
        ("file", "weights"),
        [
            ("mistral_7b.py", 7_241_732_096),
            ("mixtral_8x7b.py", 46_702_792_704),
            ("llama3_70b.py", 70_553_706_496),
        ],
    )
    def test_the_papers_models_have_their_published_size_and_fit_their_mesh(self, file, weights):
        config = load_config(str(ROOT / "configs" / file))
        shape = read_config(ROOT / "configs" / "models" / config.model)
        shapes, axes = abstract_params(shape)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == weights
        mesh = AbstractMesh(tuple(getattr(config.mesh, axis) for axis in AXES), AXES)
        shardings = param_shardings(mesh, shapes, axes)
        held = jax.tree.map(lambda sharding, leaf: math.prod(sharding.shard_shape(leaf.shape)), shardings, shapes)
        assert sum(jax.tree.leaves(held)) * mesh.size == weights
        assert config.train.weights == "float32" and config.compute_dtype == "bfloat16"

    @pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
    def test_says_its_command_hardware_duration_and_expected_result(self, path):
        text = (ast.get_docstring(ast.parse(path.read_text())) or "").lower()
        assert f"sami run --config=configs/{path.name} --workdir=" in text
        assert all(word in text for word in ("hardware", "duration", "expected"))

    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_the_papers_experiments_have_their_data_and_prompts(self, name):
        config = load_config(str(ROOT / "configs" / name))
        queries, principles, pairing = EXPERIMENTS[name]
        assert config.queries.train == config.queries.evaluation == queries and config.queries.evaluation_count == 250
        assert pathlib.Path(config.constitutions.principles).name == principles
        assert config.constitutions.pairing == pairing
        check_constitutions(config.constitutions)
        reasons = name.endswith("_reasoning")
        assert config.prompts.chain_of_thought == reasons and config.sampling.max_new_tokens == (
            500 if reasons else 350
        )
        summaries = queries == "tldr" and not reasons
        assert config.prompts.response_prefix == ("The post" if summaries else "")
        assert config.prompts.training.endswith("Summary:" if queries == "tldr" else "Assistant:")
        assert "[" in config.prompts.generation and "[" not in config.prompts.training  # the format's example
        assert bool(config.filters.evasive_beginnings) == (queries != "tldr")
        assert f"sami run --config=configs/{name} " in (ROOT / "docs" / "data.md").read_text()

    def test_an_unknown_variant_is_refused(self):
        with pytest.raises(BadConfigError, match="unknown variant 'summary'; there are summaries, dialogue_helpful"):
            load_config(str(ROOT / "configs/llama3_70b.py") + ":summary")
        with pytest.raises(BadConfigError, match="unknown variant 'smok'"):
            load_config(str(ROOT / "configs/miniature.py") + ":smok")

    def test_the_miniature_asks_as_its_base_was_taught(self):
        # configs/ may not import sami_jax, so the prompt stands twice.
        for variant in ("", ":smoke"):
            prompts = load_config(str(ROOT / "configs/miniature.py") + variant).prompts
            assert prompts.generation == prompts.training == world.PROMPT

    def test_the_smoke_run_is_the_miniature_made_small(self):
        big, small = (load_config(str(ROOT / "configs/miniature.py") + variant) for variant in ("", ":smoke"))
        assert (small.prompts, small.constitutions, small.filters) == (big.prompts, big.constitutions, big.filters)
        assert small.pretraining.steps < big.pretraining.steps and small.iterations < big.iterations

    def test_common_is_the_papers_setting(self):
        config = load_config(str(ROOT / "configs/common.py"))
        assert (config.iterations, config.train.steps, config.train.queries_per_step) == (3, (2, 4, 6), 128)


class TestHelp:
    def test_every_setting_has_a_name_a_default_and_a_meaning(self):
        described = list(describe_fields(RunConfig))
        names = [name for name, _, _ in described]

        def leaves(value: Any, name: str) -> set[str]:
            if not isinstance(value, dict):
                return {name}
            return set().union(*(leaves(inside, f"{name}.{key}") for key, inside in value.items()))

        flat = leaves(to_dict(RunConfig()), "config")
        assert set(names) == flat and len(names) == len(set(names))
        assert [name for name, _, help_text in described if len(help_text.split()) < 2] == []

    def test_defaults_are_the_real_ones(self):
        for name, default, _ in describe_fields(RunConfig):
            value = to_dict(RunConfig())
            for part in name.split(".")[1:]:
                value = value[part]
            assert default == repr(value), name

    def test_choices_are_shown(self):
        help_texts = {name: help_text for name, _, help_text in describe_fields(RunConfig)}
        assert help_texts["config.train.optimizer"].endswith("(adamw | rmsprop)")
