"""`tapfl run` with the in-process engine: the files of a run, its output, and all rules and methods."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from click.testing import Result
from faulty_apps import mortal
from killing import copied_after
from personal_problems import same_bits
from representatives import some_slow
from safetensors.torch import load_file
from typer.testing import CliRunner

from clients import caches
from clients.device import Device
from clients.images import OwnImages
from clients.storage import DeviceStorage
from experiments import cli
from experiments.engines import forked
from experiments.engines.local import LocalGrid
from experiments.jobs.federation import carry_out, in_process
from experiments.jobs.pool import unheard
from experiments.preflight import absolute_paths
from strategies import exchange, server_app
from strategies.records import Summary
from tapfl import load_plan, load_pruned
from tapfl.adapters.layout import gather_all, packed_size
from tapfl.compute import HERE
from tapfl.config import REFERENCES, RunConfig
from tapfl.data.images import ImageSet
from tapfl.errors import ConfigError, RunError
from tapfl.memo import Memo
from tapfl.options import parse_assignment
from tapfl.personalize.methods import FedAvg, Local, Pooled
from tapfl.privacy import epsilon
from tapfl.profiles import profiles_of
from tapfl.training import Params

# small enough for a second: four devices of about 30 training images, a backbone trained for two epochs
TINY = "img_size=8,patch_size=2,in_chans=1,embed_dim=32,depth=2,num_heads=2,class_token=False,global_pool=avg"
SMALL = [
    "devices.count=4",
    "data.public-share=0.8",
    "summary.max-components=2",
    f"model.args={TINY}",
    "model.epochs=2",
    "train.rounds=2",
    "train.epochs=1",
    "personalize.from-round=1",
    "personalize.held-out-share=0.5",  # of 30 images: enough to choose α
    "metric.size=64",
    "pruning.align=1",
    "pruning.criterion=tap",  # its plans determine the models, and it is the fastest criterion
]


def tapfl(*arguments: str, cache: Path, options: list[str] | None = None, report: str = "--no-report") -> Result:
    sets = [part for option in [*SMALL, f"cache={cache}", *(options or [])] for part in ("--set", option)]
    command = ["run", "--engine", "inprocess", report, *sets, *arguments]
    return CliRunner().invoke(cli.app, command, catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = tapfl("--out", str(folder), "--json", cache=cache)
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_json_is_the_last_line_and_has_the_documented_fields(finished: tuple[Path, dict[str, object]]) -> None:
    folder, said = finished
    assert said["run"] == str(folder)
    for key in ("personal_accuracy", "personal_accuracy_worst_decile", "dense_accuracy", "pruned_accuracy"):
        assert 0 <= said[key] <= 1
    assert set(said["seconds"]) == {"backbone", "round zero", "rounds", "evaluation"}
    timing = json.loads((folder / "timing.json").read_text())
    assert {phase: round(seconds, 3) for phase, seconds in timing["seconds"].items()} == said["seconds"]
    assert said["bytes_up"] > 0 and said["bytes_down"] > 0 and said["devices"] == 4


def test_the_folder_is_complete(finished: tuple[Path, dict[str, object]]) -> None:
    folder, _ = finished
    config = RunConfig.from_flat(json.loads((folder / "config.json").read_text()))
    assert config.devices.count == 4 and config.train.rounds == 2
    assert {"torch", "timm", "flwr", "tapfl"} <= set(json.loads((folder / "versions.json").read_text()))
    for i in range(4):
        assert (folder / "plans" / f"{i:02d}.json").is_file()
        mixture = load_file(folder / "summaries" / f"{i:02d}.safetensors")
        assert float(mixture["weights"].sum()) == pytest.approx(1)
        assert {f.name for f in (folder / "devices" / f"{i:02d}" / "state").iterdir()} == {
            "round-0001.safetensors",
            "round-0002.safetensors",
        }
    assert (folder / "server" / "round-0002.safetensors").is_file()


def test_metrics_have_a_line_a_device_a_round_and_one_a_round(finished: tuple[Path, dict[str, object]]) -> None:
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "round"] == [0, 1, 2]
    assert sorted((line["round"], line["device"]) for line in lines if line["kind"] == "device") == [
        (round, device) for round in range(3) for device in range(4)
    ]


def test_devices_stay_within_their_budgets(finished: tuple[Path, dict[str, object]]) -> None:
    folder, _ = finished
    for record in json.loads((folder / "summary.json").read_text())["devices"]:
        budget = float(record["profile"]["budget"])
        assert budget * 0.995 <= record["macs_share"] <= budget


def test_the_first_global_adapters_change_nothing(finished: tuple[Path, dict[str, object]]) -> None:
    """B is zero before the first round, so the first adapters have exactly the accuracy of the pruned model."""
    folder, _ = finished
    pruned = {r["device"]: r["pruned_accuracy"] for r in json.loads((folder / "summary.json").read_text())["devices"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "device" and line["round"] == 0:
            assert line["global_accuracy"] == line["personal_accuracy"] == pruned[line["device"]]


def test_a_personal_model_loads_with_stock_peft(finished: tuple[Path, dict[str, object]]) -> None:
    from peft import PeftModel  # imports transformers, which no other test of this file needs

    device = finished[0] / "devices" / "01"
    plan, _ = load_plan(device / "pruned")
    base = load_pruned(device / "pruned")
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = base(x)
    personal = PeftModel.from_pretrained(base, str(device / "personal")).eval()
    assert plan.backbone.num_classes == 10
    assert (personal(x) - before).abs().max() > 1e-4


def test_devices_that_step_together_end_where_they_end_one_by_one(
    finished: tuple[Path, dict[str, object]], cache: Path, tmp_path: Path
) -> None:
    done = tapfl("--out", str(tmp_path / "together"), "--json", cache=cache, options=["train.together=auto"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["personal_accuracy"] == pytest.approx(finished[1]["personal_accuracy"], abs=1e-2)
    ours, theirs = (
        load_file(path / "server" / "round-0002.safetensors") for path in (tmp_path / "together", finished[0])
    )
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)  # they did step together
    for name, theta in theirs.items():
        torch.testing.assert_close(ours[name], theta, rtol=1e-4, atol=1e-5)


def backbones(cache: Path) -> set[str]:
    return {file.name for file in (cache / "backbones").iterdir()}


RULES = ["fedit", "ffa", "rolora", "embed_side", "flex"]
METHODS = [
    "apfl",
    "ditto",
    "local",
    "pooled",
    "fedavg",
    "fedavg+finetune",
    "fedprox",
    "perfedavg",
    "pfedme",
    "fedper",
    "fedala",
    "fedrep",
]
BESIDE = "alone:0.01,dense+alone:0.01,pooled:0.01"
NEEDS = {
    "fedper": ["adapters.head=personal"],
    "fedrep": ["adapters.head=personal", "train.epochs=2"],
    "pfedme": ["personalize.inner-steps=2"],  # fewer passes than by default, for the test's time
    "fedala": ["personalize.ala-share=0.3"],
}
TRAINING = [
    *("train.optimizer=sgd", "train.learning-rate=0.05", "train.momentum=0.9", "train.weight-decay=1e-4"),
    *("train.steps=5", "train.clip-gradient=1", "train.label-smoothing=0.1", "train.augment=crop"),
    *("train.evaluate-every=2", "train.label-prior=counts"),
]
THREE = ["devices.count=3", "data.public-share=0.85"]  # one for each of the default budgets and ranks
ALPHA = ["personalize.alpha-per=layer", "personalize.alpha-on=train"]
WARM = ["adapters.start-rounds=1", "adapters.start-steps=4"]
# The default suite runs every rule and every method, but not every pair: methods that are not in DEFAULT are in OPTIONS
# or, fedavg and pooled, in the test of references.
PAIRS = list(zip(itertools.cycle(RULES), METHODS, strict=False))
DEFAULT = {"ditto", "local", "perfedavg", "fedala", "fedrep"}
OPTIONS = [
    ["adapters.combine=median", "adapters.rule=flex", "personalize.learning-rate=0.001", *ALPHA],
    [
        *("adapters.combine=trimmed-mean", "adapters.rule=ffa", "adapters.server=momentum"),
        *("personalize.method=fedprox", *TRAINING),
    ],
    [
        *("adapters.clip=0.5", "adapters.server=adam", "train.label-prior=counts", "adapters.rule=rolora"),
        *("personalize.method=fedavg+finetune", f"personalize.references={BESIDE}"),
    ],
    ["adapters.rule=hetlora", "adapters.head=personal", "personalize.method=fedper"],
    [
        *("adapters.start=pool", "adapters.blocks=1", "adapters.rule=embed_side", *WARM),
        *("personalize.method=pfedme", *NEEDS["pfedme"], "personalize.references=alone"),
    ],
    ["personalize.from-round=2", "adapters.rule=embed_side"],  # first only w, then also v, with private parts of w
    [
        *("privacy.dp-clip=1", "privacy.dp-noise=4", "adapters.rule=fedit"),
        *("personalize.from-round=3", "personalize.method=ditto"),  # v would begin after the last round
    ],
]


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs that share round zero if their options for it are equal."""
    return tmp_path_factory.mktemp("sharing")


def goes_on(sharing: Path, cache: Path, options: list[str]) -> tuple[Path, Summary]:
    """Resumes a run that was killed after the first of two rounds; returns the uninterrupted run and its results.

    Round zero is another run's, if that had the same options for it: what is compared comes after it.
    """
    given = dict(parse_assignment(option) for option in [*SMALL, *THREE, f"cache={cache}", *options])
    whole, copies = (Path(tempfile.mkdtemp(dir=sharing)) for _ in range(2))
    with copied_after({"killed": ("strategies.server_app", "save_checkpoint", 2)}, whole, copies):
        summary = carry_out(unheard, given, whole, in_process)
    carry_out(unheard, given, copies / "killed", in_process)
    assert content(copies / "killed") == content(whole)
    return whole, summary


@pytest.mark.parametrize(("rule", "method"), some_slow(PAIRS, [pair for pair in PAIRS if pair[1] not in DEFAULT]))
def test_every_rule_and_every_method_runs_and_resumes(cache: Path, sharing: Path, rule: str, method: str) -> None:
    options = [f"personalize.method={method}", f"adapters.rule={rule}", *NEEDS.get(method, [])]
    run, summary = goes_on(sharing, cache, options)
    if method == "fedavg":
        assert summary.personal_accuracy == summary.global_accuracy
    if method in ("local", "pooled"):
        assert summary.adapter_bytes_up_per_round < 100
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        down = {
            phase: [line["down"]["adapters"] for line in lines if line["kind"] == "traffic" and line["phase"] == phase]
            for phase in ("round 1", "round 2", "evaluation")
        }
        assert min(down["round 1"]) > 1000 and max(down["round 2"] + down["evaluation"]) < 200
    else:
        full = {"flex": 1, "fedit": 1}.get(rule, 0.65)  # the others send half of the factors and the head
        sent = summary.devices[0].bytes_up["adapters"]
        kept = load_file(run / "devices" / "00" / "personal" / "adapter_model.safetensors")
        whole = 4 * sum(t.numel() for t in kept.values()) / (2 if method in {"apfl"} else 1)
        assert sent / 2 <= whole * full * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "extra",
    [
        ["adapters.head=personal"],
        ["adapters.head=mean"],
        ALPHA,
        ["personalize.from-round=2", "personalize.learning-rate=0.001"],
    ],
    ids=" ".join,
)
def test_every_rule_with_every_method_and_extra(
    cache: Path, sharing: Path, rule: str, method: str, extra: list[str]
) -> None:
    if (method, rule) == ("fedala", "rolora"):
        pytest.skip("refused by name: tests/test_personalize.py")
    options = [f"personalize.method={method}", f"adapters.rule={rule}", *extra, *NEEDS.get(method, [])]
    goes_on(sharing, cache, options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options[:3]))
def test_options_in_addition_to_a_rule_run_and_resume(cache: Path, sharing: Path, options: list[str]) -> None:
    run, summary = goes_on(sharing, cache, options)
    if "train.evaluate-every=2" in options:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        known = {line["round"]: line.get("personal_accuracy") for line in lines if line["kind"] == "round"}
        assert known[0] is not None and known[1] is None and known[2] is not None
    if "privacy.dp-clip=1" in options:
        assert summary.epsilon == pytest.approx(epsilon(4, 2, 1e-5))
    else:
        assert summary.epsilon is None


def test_references_equal_the_models_of_separate_runs(cache: Path, tmp_path: Path) -> None:
    """They change nothing else: the shared model has the same bits."""
    runs, two = {}, ["devices.count=2", "data.public-share=0.9", "train.rounds=1"]
    alone = ["personalize.method=local", "personalize.learning-rate=0.01", "train.steps=3"]
    for name, options in {
        "beside": ["personalize.method=fedavg", f"personalize.references={BESIDE}", "train.steps=3"],
        "plain": ["personalize.method=fedavg", "train.steps=3"],
        "alone": alone,
        "dense+alone": [*alone, "devices.budgets=1,1,1"],
        "pooled": [*alone, "personalize.method=pooled"],
    }.items():
        done = tapfl("--out", str(tmp_path / name), cache=cache, options=[*two, *options])
        assert done.exit_code == 0, done.output
        assert [f"personal - {reference}: " in done.output for reference in REFERENCES] == 3 * [name == "beside"]
        assert bool(re.search(r"pooled\W+global", done.output)) == (name == "beside")
        runs[name] = json.loads((tmp_path / name / "summary.json").read_text())
    for k, (beside, plain) in enumerate(zip(runs["beside"]["devices"], runs["plain"]["devices"], strict=True)):
        own = {name: runs[name]["devices"][k]["personal_accuracy"] for name in REFERENCES}
        assert beside["reference_accuracies"] == own and plain["reference_accuracies"] is None
        assert beside["global_accuracy"] == plain["global_accuracy"] == plain["personal_accuracy"]  # FedAvg
    last = [json.loads(line) for line in (tmp_path / "beside" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["reference_accuracies"] == pytest.approx(runs["beside"]["reference_accuracies"])
    state = Path("server") / "round-0001.safetensors"
    shared = [load_file(tmp_path / name / state) for name in ("beside", "plain")]
    assert all(torch.equal(shared[0][key], shared[1][key]) for key in shared[1])


def test_all_devices_get_the_warm_start(cache: Path, tmp_path: Path) -> None:
    """Including a device that trains alone, as a reference or with `local`."""
    warm = [
        "adapters.start=metric-sets",
        "adapters.start-learning-rate=0.001",
        *WARM,
        "devices.participation=0.5",
        "train.steps=5",
        *THREE,
    ]
    runs = {}
    for name, method in {"beside": "fedavg", "local": "local"}.items():
        options = [
            *warm,
            f"personalize.method={method}",
            *(["personalize.references=alone"] if name == "beside" else []),
        ]
        done = tapfl("--out", str(tmp_path / name), cache=cache, options=options)
        assert done.exit_code == 0, done.output
        runs[name] = json.loads((tmp_path / name / "summary.json").read_text())["devices"]
        made = load_file(tmp_path / name / "start.safetensors")
        assert all(made[tensor].any() for tensor in made)
    assert [device["rounds"] for device in runs["local"]] != [2, 2, 2]
    for beside, local in zip(runs["beside"], runs["local"], strict=True):
        assert beside["reference_accuracies"] == {"alone": local["personal_accuracy"]}


def content(folder: Path) -> dict[str, bytes]:
    """Returns all results of a run: tensors, plans and metrics, without times and the name of the folder."""
    files = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if (file.is_file() and file.suffix in {".safetensors", ".jsonl"}) or file.parent.name == "plans"
    }
    assert len(files) > 10
    return files


def test_devices_that_differ_come_and_go(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Participation, losses and late devices are in the metrics, and time and bytes follow from the profiles."""
    file = tmp_path / "devices.toml"
    file.write_text(
        '[[device]]\nname = "fast"\ncount = 3\nbudget = 0.7\nrank = 8\n'
        '[[device]]\nname = "slow"\nbudget = "macs<=0.3"\nrank = 2\ncompute = 1e3\n'
    )
    options = [f"devices.profiles={file}", "devices.deadline=50", "devices.dropout=0.3", "train.rounds=4"]
    made = []
    monkeypatch.setattr(server_app, "gather_all", lambda *arguments: made.append(1) or gather_all(*arguments))
    done = tapfl("--out", str(tmp_path / "run"), "--json", cache=cache, options=options)
    assert done.exit_code == 0, done.output
    assert "macs<=0.3" in tapfl("--resume", str(tmp_path / "run"), cache=cache, options=options).stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    absences = [line for line in lines if line["kind"] == "absence"]
    assert {(line["device"], line["reason"]) for line in absences if line["reason"] == "late"} == {(3, "late")}
    assert {line["reason"] for line in absences} == {"late", "dropped out"}
    trained = [line for line in lines if line["kind"] == "traffic" and line["phase"].startswith("round")]
    assert len(trained) + len(absences) == 4 * 4
    assert all(line["up"].keys() == {"adapters"} and 0 < line["simulated_seconds"] < 50 for line in trained)
    clock = [line["simulated_seconds"] for line in lines if line["kind"] == "round"]
    assert all(later - earlier == pytest.approx(50) for earlier, later in itertools.pairwise(clock))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["simulated_seconds"] == clock[-1] and summary["failures"] == 0
    spent = [line["bytes_up"] + line["bytes_down"] for line in lines if line["kind"] == "round"]
    assert [(point["seconds"], point["bytes"]) for point in summary["curve"]] == list(zip(clock, spent, strict=True))
    traffic = [line for line in lines if line["kind"] == "traffic" and line["phase"] == "evaluation"]
    last = sum(sum(line[side].values()) for line in traffic for side in ("up", "down"))
    assert summary["bytes_up"] + summary["bytes_down"] == spent[-1] + last
    each_round = sum(line["down"]["adapters"] for line in traffic)  # as much as training: also to those that are absent
    sent = [line["bytes_down"] for line in lines if line["kind"] == "round"]
    assert all(later - earlier == each_round for earlier, later in itertools.pairwise(sent))
    assert len(made) == len(trained) + len(traffic)  # a message that is only counted is not made
    assert list(summary["time_to_accuracy"].values()) == sorted(summary["time_to_accuracy"].values())
    assert [record["rounds"] for record in summary["devices"]][3] == 0


def test_a_run_without_workers_ends_and_names_the_command_to_continue(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked, "_keep", lambda *_: os._exit(1))
    with pytest.raises(RunError, match=r"forks the workers has ended; .* continue with: tapfl run --resume .*/run$"):
        tapfl("--out", str(tmp_path / "run"), "--workers", "2", cache=cache)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("fedala", "personalize.method = 'fedala' trains each device by itself"),
        ("layer", "personalize.alpha-per = 'layer' trains each device by itself"),
        ("apfl", "this engine hands out single messages; only inprocess and ray hand out groups"),
    ],
)
def test_devices_that_cannot_step_together_are_refused_before_anything_is_computed(
    method: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "apfl":
        monkeypatch.delattr(LocalGrid, "push_group")  # like Flower's grid
    options = ALPHA if method == "layer" else [f"personalize.method={method}"]
    out, options = tmp_path / "run", ["train.together=2", *options]
    with pytest.raises(ConfigError, match=re.escape(f"train.together = 2: {why}; accepted: 1, auto")):
        tapfl("--out", str(out), cache=tmp_path / "cache", options=options)
    assert not out.exists() and not (tmp_path / "cache" / "backbones").exists()


def test_a_round_without_devices_changes_nothing(cache: Path, tmp_path: Path) -> None:
    options = ["devices.dropout=0.999", "train.rounds=2"]
    done = tapfl("--out", str(tmp_path / "run"), "--json", cache=cache, options=options)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["personal_accuracy"] == said["global_accuracy"] == said["pruned_accuracy"]


def test_nothing_is_trained_on_the_images_that_choose_alpha(
    finished: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other pixels in the held-out images the upload has the same bits, but α differs."""
    folder, _ = finished
    config = RunConfig.from_flat(json.loads((folder / "config.json").read_text()))
    profile = profiles_of(config.devices)[1]
    device = Device(config, 1, 4, profile, DeviceStorage(folder / "devices" / "01"))
    part = device._images.part("train")
    trained, held = device._images.trained_and_held_out
    assert len(held) == round(0.5 * len(part)) and sorted([*trained, *held]) == list(range(len(part)))
    received = device._whole(FedAvg(), device._state(2), np.zeros(packed_size(device._pruned.layout), np.float32))
    own = device._state(2).personal
    assert own is not None

    def outcome(changed: np.ndarray) -> tuple[Params, float]:
        pixels = part.images.read()
        pixels[changed] = pixels[changed, :, ::-1]
        other = replace(part, images=ImageSet.of(pixels, part.images.labels, part.images.classes))
        monkeypatch.setattr(OwnImages, "part", lambda self, name: other)
        method = device._method(3)
        upload = device._local_task(method, received, own, 3).alone().upload
        weighed = device._weighted(method, received, own, 3)
        assert upload is not None and weighed is not None
        return upload, weighed.mean_alpha

    (upload, alpha), (of_held, alpha_of_held), (of_trained, alpha_of_trained) = (
        outcome(changed) for changed in (held[:0], held, trained[:1])
    )
    assert same_bits(upload, of_held) and alpha != alpha_of_held
    assert not same_bits(upload, of_trained) and alpha == alpha_of_trained


@pytest.mark.parametrize("length", [{"train.epochs": 3}, {"train.steps": 7}], ids=["epochs", "steps"])
@pytest.mark.parametrize("method", ["apfl", "pooled"])
def test_models_for_comparison_take_as_many_steps_as_the_devices_own_on_its_own_images(
    finished: tuple[Path, dict[str, object]], method: str, length: dict[str, int]
) -> None:
    """APFL trains on fewer images than its references, `pooled` on more."""
    folder, _ = finished
    options = json.loads((folder / "config.json").read_text()) | {"personalize.method": method, "train.batch": 5}
    config = RunConfig.from_flat(options | length)
    device = Device(config, 1, 4, profiles_of(config.devices)[1], DeviceStorage(folder / "devices" / "01"))
    start = device._start(np.zeros(packed_size(device._pruned.layout), np.float32))
    own, held_out = (len(positions) for positions in device._images.trained_and_held_out)
    assert bool(held_out) == (method == "apfl")
    tasks = [device._local_task(device._method(2), start, None, 2)]
    tasks += [device._local_task(other, start, None, 2, device._pruned) for other in (Local(0.01), Pooled(0.01))]
    expected = length.get("train.steps") or 3 * -(-own // 5)
    assert [(task.train.steps, len([*task.batches])) for task in tasks] == [(expected, expected)] * 3


def test_with_few_images_none_is_held_out_and_alpha_is_the_prior(finished: tuple[Path, dict[str, object]]) -> None:
    folder, _ = finished
    settings = json.loads((folder / "config.json").read_text())
    config = RunConfig.from_flat(settings | {"personalize.held-out-share": 0.25})
    device = Device(config, 1, 4, profiles_of(config.devices)[1], DeviceStorage(folder / "devices" / "01"))
    trained, held = device._images.trained_and_held_out
    assert np.array_equal(trained, np.arange(len(device._images.part("train")))) and len(held) == 0
    own = device._state(2).personal
    assert own is not None
    weighed = device._weighted(device._method(3), own.params, own, 3)
    assert weighed is not None and weighed.mean_alpha == pytest.approx(0.3146, abs=1e-4)


def test_a_second_run_on_forked_workers_repeats_to_the_bit_and_finds_the_backbone(
    finished: tuple[Path, dict[str, object]], cache: Path, tmp_path: Path
) -> None:
    found = backbones(cache)
    done = tapfl("--out", str(tmp_path / "two"), "--workers", "2", cache=cache)
    assert done.exit_code == 0, done.output
    assert "personal" in done.stdout and str(tmp_path / "two") in done.stdout
    assert content(finished[0]) == content(tmp_path / "two")
    assert backbones(cache) == found


def test_a_killed_forked_worker_is_replaced_and_its_messages_are_sent_again(
    finished: tuple[Path, dict[str, object]],
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "RETRY_AFTER", 0.01)
    given = dict(option.split("=", 1) for option in SMALL) | {"out": str(tmp_path / "run"), "cache": str(cache)}
    config = absolute_paths(RunConfig.from_flat(given))
    before = psutil.Process().children(recursive=True)
    forked.run_forked(server_app.app, mortal, config.flat(), config.devices.count, workers=2)
    assert (tmp_path / "died").exists() and "sent again" in caplog.text
    assert content(tmp_path / "run") == content(finished[0])
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_images_and_models_of_devices_share_one_limit(
    finished: tuple[Path, dict[str, object]], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "kept", Memo(0, lambda each: each.nbytes))
    images = np.zeros((160, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(160) % 2, device=np.arange(160) // 40)
    given = {"data.source": str(tmp_path / "a.npz"), "data.partition": "natural", "cache": str(cache)}
    options = {"model.args": "img_size=64,in_chans=3", "data.public-share": 0.1, "compute.cache-mb": 1}
    config = RunConfig.from_flat(given | options)
    for i in range(4):
        caches.part(caches.Owner(config, 4, i), "train", (), HERE).batch(np.arange(2))
        caches.pruned(finished[0] / "devices" / f"{i:02d}" / "pruned", i, 4, config, HERE)
        held = list(caches.kept)
        assert {type(each) for each in held} == {caches.Part, caches.AdaptedDevice}
        assert sum(each.nbytes for each in held) <= 2**20
    assert len(held) < 8 and caches.kept.limit == 2**20
