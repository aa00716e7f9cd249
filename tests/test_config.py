"""Options: valid values round-trip; invalid ones are named with the value and what is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.preflight import absolute_paths
from tapfl.config import BUILT_IN, RunConfig
from tapfl.data import sources
from tapfl.errors import ConfigError
from tapfl.options import flatten, parse_assignment, read_toml
from tapfl.store import cache_folder


def test_the_defaults_are_valid_and_round_trip() -> None:
    config = RunConfig()
    flat = config.flat()
    assert RunConfig.from_flat(flat) == config
    assert flat["devices.budgets"] == "0.3,0.5,0.7"
    assert flat["data.public-share"] == 0.5
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert RunConfig.from_flat(json.loads(json.dumps(flat))) == config


pairs = st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 64)), min_size=1, max_size=5)


@settings(max_examples=15)
@given(
    pairs=pairs,
    tau=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**63 - 1),
    batches=st.integers(1, 50),
    batch=st.integers(4, 128),
    name=st.text(min_size=1),
)
def test_any_valid_configuration_round_trips(
    pairs: list[tuple[float, int]], tau: float, seed: int, batches: int, batch: int, name: str
) -> None:
    config = RunConfig.from_flat(
        {
            "devices.budgets": ",".join(str(budget) for budget, _ in pairs),
            "devices.ranks": [rank for _, rank in pairs],
            "pruning.tau": tau,
            "seed": seed,
            "metric.size": batch * batches,
            "metric.batch": batch,
            "data.source": name,
        }
    )
    assert config.devices.budgets == tuple(budget for budget, _ in pairs)
    assert config.devices.ranks == tuple(rank for _, rank in pairs)
    assert config.data.source == name
    assert RunConfig.from_flat(config.flat()) == config


@pytest.mark.parametrize("value", [0.4, "0.4", [0.4], " 0.4 ,"])
def test_a_list_of_one_may_be_written_without_a_list(value: object) -> None:
    config = RunConfig.from_flat({"devices.budgets": value, "devices.ranks": 4})
    assert config.devices.budgets == (0.4,)
    assert config.devices.ranks == (4,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pruning.taw": 3}, ["pruning.taw: is not an option", "accepted here: criterion, ratio, tau, basis"]),
        ({"prunning.tau": 3}, ["prunning: is not an option", "pruning", "devices"]),
        ({"sead": 3}, ["sead: is not an option", "seed"]),
        ({"a.b.c": 3}, ["a: is not an option"]),
        ({"train.rounds.x": 3}, ["train.rounds.x: is not an option", "rounds, epochs"]),
        ({"train": 3}, ["train = 3: is a table of options"]),
        ({"train.together": "many"}, ["train.together = 'many': ", "valid integer, ", ", or input should be 'auto'"]),
        ({"pruning.ffn-terms": 0.5}, ["pruning.ffn-terms = 0.5: needs three numbers"]),
        ({"devices.budgets": "x,y"}, ["devices.budgets = 'x': input should be a valid number"]),
        ({"personalize.ala-layers": 10**20}, ["personalize.ala-layers = 1", "less than or equal to 1000000000"]),
        ({"train.rounds": "many"}, ["train.rounds = 'many'", "valid integer"]),
        ({"train.rounds": 2.5}, ["train.rounds = 2.5", "integer"]),
        ({"train.rounds": True}, ["train.rounds = True", "true and false are not accepted"]),
        ({"train.rounds": 0}, ["train.rounds = 0", "greater than or equal to 1"]),
        ({"train.learning-rate": 0}, ["train.learning-rate = 0", "greater than 0"]),
        ({"train.learning-rate": float("inf")}, ["train.learning-rate = inf", "finite"]),
        ({"pruning.tau": float("nan")}, ["pruning.tau = nan"]),
        ({"data.public-share": 1}, ["data.public-share = 1", "less than 1"]),
        (
            {"data.partition": "equal"},
            [
                "data.partition = 'equal'",
                "'pathological', 'class-blocks', 'dirichlet', 'iid', 'shard', 'natural'",
            ],
        ),
        ({"adapters.rule": ""}, ["adapters.rule = ''", "must be one of fedit, ffa, rolora, embed_side, hetlora, flex"]),
        ({"adapters.trim": 0.5}, ["adapters.trim = 0.5", "less than 0.5"]),
        ({"adapters.clip": -1}, ["adapters.clip = -1", "greater than or equal to 0"]),
        ({"adapters.head": "own"}, ["adapters.head = 'own'", "'class-rows', 'mean' or 'personal'"]),
        ({"adapters.combine": "mode"}, ["adapters.combine = 'mode'", "'mean', 'median' or 'trimmed-mean'"]),
        ({"adapters.server": "sgd"}, ["adapters.server = 'sgd'", "'none', 'momentum' or 'adam'"]),
        ({"adapters.server-momentum": 1}, ["adapters.server-momentum = 1", "less than 1"]),
        ({"adapters.server-epsilon": 0}, ["adapters.server-epsilon = 0", "greater than 0"]),
        (
            {"adapters.rule": "hetlora", "adapters.combine": "median"},
            ["adapters: rule=hetlora", "combine=median", "accepted: mean"],
        ),
        ({"privacy.dp-noise": 1.0}, ["privacy: dp-noise=1.0", "needs dp-clip above 0"]),
        ({"privacy.dp-delta": 1}, ["privacy.dp-delta = 1", "less than 1"]),
        (
            {"privacy.dp-clip": 1.0},
            ["privacy.dp-clip=1.0", "adapters.rule=flex: accepted are fedit, ffa, rolora and embed_side"],
        ),
        (
            {"privacy.dp-clip": 1.0, "adapters.rule": "ffa", "adapters.combine": "trimmed-mean"},
            ["privacy.dp-clip=1.0", "adapters.combine=trimmed-mean: accepted is mean"],
        ),
        (
            {"privacy.dp-clip": 1.0, "adapters.rule": "hetlora"},
            ["privacy.dp-clip=1.0", "adapters.rule=hetlora: accepted are fedit"],
        ),
        (
            {"devices.budgets": "0.3,1.7", "devices.ranks": "4,8"},
            ["devices.budgets = '1.7'", "less than or equal to 1"],
        ),
        ({"devices.budgets": 0, "devices.ranks": 4}, ["devices.budgets = 0", "greater than 0"]),
        ({"devices.budgets": ""}, ["devices.budgets", "at least 1 item"]),
        ({"devices.budgets": "0.3,0.5"}, ["devices: budgets and ranks must be equally long, got 2 and 3"]),
        ({"metric.size": 100, "metric.batch": 64}, ["metric: size=100 must be a multiple of batch=64"]),
        (
            {"model.head-rows": "rows.json"},
            ["model: head-rows=rows.json is not used with head=train", "accepted: head=rows"],
        ),
        ({"summary.min-support": 1}, ["summary.min-support = 1", "greater than or equal to 2"]),
        ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
        ({"seed": 2**63}, [f"seed = {2**63}", "less than"]),
        ({"pruning.ffn-terms": "0.1,0.9"}, ["pruning.ffn-terms"]),
        ({"pruning.ffn-terms": "0.1,0.1,0.1,0.7"}, ["pruning.ffn-terms"]),
        ({"pruning.ffn-terms": "0,-1,2"}, ["pruning.ffn-terms = '-1'", "greater than or equal to 0"]),
        (
            {"pruning.attention-terms": "0,0,0"},
            ["pruning.attention-terms = '0,0,0'", "at least one weight"],
        ),
        ({"pruning.unit-shape": "rows"}, ["pruning.unit-shape = 'rows'", "'head-dims', 'heads' or 'both'"]),
        ({"pruning": 3}, ["pruning = 3"]),
        ({"pruning": 3, "pruning.tau": 5.0}, ["pruning = 3"]),
        ({"pruning.tau": 5.0, "pruning": 3}, ["pruning = 3"]),
        ({"pruning.tau.x": 5.0}, ["pruning.tau"]),
    ],
    ids=lambda case: ",".join(map(str, case)) if isinstance(case, dict) else "",
)
def test_an_invalid_option_is_named_with_its_value_and_what_is_accepted(options: dict, said: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat(options)
    for part in said:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value).strip()


def test_all_invalid_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat({"train.rounds": 0, "pruning.floor": 1.0, "nonsense": 1})
    assert len(str(refusal.value).splitlines()) == 3


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.rounds = 3  # type: ignore[misc]


def test_toml_is_read_with_dotted_names(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[devices]\nbudgets = [0.5, 0.6]\nranks = [4, 8]\n[data]\nsource = "a,b"\n')
    assert read_toml(file) == {
        "seed": 3,
        "devices.budgets": "0.5,0.6",
        "devices.ranks": "4,8",
        "data.source": "a,b",
    }
    assert RunConfig.from_flat(read_toml(file)).devices.budgets == (0.5, 0.6)


@pytest.mark.parametrize("content", [b"seed = ", b"[data\n", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml: is not TOML"):
        read_toml(file)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.rounds=5", ("train.rounds", 5)),
        ("pruning.tau = 0.5", ("pruning.tau", 0.5)),
        ("a=true", ("a", True)),
        ("data.source=digits", ("data.source", "digits")),
        ("model.args=img_size=8,depth=2", ("model.args", "img_size=8,depth=2")),
        ("devices.budgets=0.3,0.5", ("devices.budgets", "0.3,0.5")),
        ("devices.ranks=[4]", ("devices.ranks", "[4]")),
        ("out=", ("out", "")),
        ("out=null", ("out", "null")),
    ],
)
def test_an_assignment(text: str, expected: tuple[str, object]) -> None:
    key, value = parse_assignment(text)
    assert (key, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["train.rounds", "=5", " =5", ""])
def test_an_invalid_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must have the form key=value, such as"):
        parse_assignment(text)


def test_flatten_keeps_scalars_and_joins_lists() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, "x"], "e": True}) == {"a.b.c": 1, "d": "1,x", "e": True}


def test_options_that_name_files_are_known() -> None:
    config = RunConfig.from_flat({"data.source": "hf:mnist", "model.weights": "w.safetensors", "out": "runs/1"})
    assert config.paths() == {"out": "runs/1", "model.weights": "w.safetensors"}
    built_in = {"data.source": "digits", "data.public": "letters", "devices.profiles": "tiers"}
    assert RunConfig.from_flat(built_in).paths() == {}
    assert sources.BUILT_IN.keys() == set(BUILT_IN["data.source"])


@pytest.mark.parametrize(("option", "value"), [("data.source", "mobile"), ("data.public", "hub"), ("cache", "digits")])
def test_a_name_that_is_built_in_for_another_option_is_a_path(option: str, value: str) -> None:
    config = RunConfig.from_flat({option: value})
    assert config.paths() == {option: value}
    assert absolute_paths(config).flat()[option] == str(Path(value).absolute())


def test_a_table_in_a_folder_gets_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = absolute_paths(RunConfig.from_flat({"data.source": "hf:table:test", "data.public": "hf:~/table"}))
    assert (config.data.source, config.data.public) == (f"hf:{tmp_path}/table:test", f"hf:{tmp_path}/table")
    assert absolute_paths(RunConfig.from_flat({"data.source": "hf:mnist"})).data.source == "hf:mnist"
    monkeypatch.setenv("TAPFL_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"


@pytest.mark.parametrize(
    "option",
    ["model.learning-rate", "train.learning-rate", "pruning.recovery-learning-rate", "adapters.server-learning-rate"],
)
def test_a_learning_rate_that_underflows_in_float32_is_refused(option: str) -> None:
    assert RunConfig.from_flat({option: 1e30}).flat()[option] == 1e30
    with pytest.raises(ConfigError, match=rf"{option} = 1e\+39"):
        RunConfig.from_flat({option: 1e39})
