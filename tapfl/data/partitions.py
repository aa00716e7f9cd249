"""Divides private images among devices with the partitioners of flwr-datasets, by class name or short name."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tapfl.arguments import is_list, parameters, parse_args, require_taken
from tapfl.config import DataOptions
from tapfl.errors import DataError, message_of
from tapfl.seeds import numpy_generator

MIN_TRAIN, MIN_TEST = 8, 2
OURS = ("num_partitions", "seed")  # arguments that are set by other options


def divide(
    labels: np.ndarray, options: DataOptions, devices: int, seed: int, owners: np.ndarray | None = None
) -> list[np.ndarray]:
    """Returns the sorted positions, int64, of each device's images. Some partitioners leave images without a device.

    Args:
        labels: int64 (n,), classes of the private images.
        devices: number of devices; 0: as many as the partitioner makes, if it determines that
            (`DataOptions.makes_devices`).
        owners: natural device of each image, int64 (n,), if it is known.

    Raises:
        DataError: if the partitioner does not take an argument, or there are too few images for that many devices.
    """
    from datasets import Dataset  # imports pyarrow and pandas, which takes seconds

    _check_enough(labels, options, devices)
    order = numpy_generator(seed, "order").permutation(len(labels))
    columns = {"label": labels[order].tolist(), "position": order.tolist()}
    if owners is not None:
        columns["device"] = owners[order].tolist()
    partitioner = _partitioner(options, devices, int(numpy_generator(seed, "partition").integers(2**31)), columns)
    partitioner.dataset = Dataset.from_dict(columns)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # with few devices, some classes belong to none; intended
            made = partitioner.num_partitions
            parts = [partitioner.load_partition(i)["position"] for i in range(min(devices or made, made))]
    except Exception as error:  # partitioners check some arguments only now, with the labels
        why = " ".join(str(error).split()) if isinstance(error, ValueError) else message_of(error)
        raise DataError(f"data.partition = {options.partition!r} for {devices} devices: {why}") from None
    if devices not in (0, made) and options.partition != "class-blocks":  # class-blocks may leave classes out
        makes = f"data.partition = {options.partition!r} makes {made}"
        raise DataError(f"devices.count = {devices}: {makes}; accepted: {made}")
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _check_enough(labels: np.ndarray, options: DataOptions, devices: int) -> None:
    most, classes = len(labels) // (MIN_TRAIN + MIN_TEST), len(np.unique(labels))
    if devices > most:
        raise DataError(f"devices.count = {devices}: {len(labels)} private images allow at most {most} devices")
    if options.partition == "shard" and devices * options.shards_per_device > len(labels):
        raise DataError(
            f"data.shards-per-device = {options.shards_per_device}: {len(labels)} private images make at most "
            f"{len(labels) // devices} shards for each of {devices} devices"
        )
    if options.partition == "class-blocks" and devices * options.classes_per_device > classes:
        raise DataError(
            f"data.classes-per-device = {options.classes_per_device}: {classes} classes make at most "
            f"{classes // options.classes_per_device} disjoint blocks for {devices} devices"
        )


def _partitioner(options: DataOptions, devices: int, seed: int, columns: dict[str, Any]) -> Any:
    from flwr_datasets import partitioner as flwr

    by_label = {"num_partitions": devices, "partition_by": "label", "seed": seed}
    match options.partition:
        case "iid":
            return flwr.IidPartitioner(num_partitions=devices)
        case "class-blocks":
            return flwr.GroupedNaturalIdPartitioner(
                partition_by="label", group_size=options.classes_per_device, sort_unique_ids=True
            )
        case "shard":
            return flwr.ShardPartitioner(**by_label, num_shards_per_partition=options.shards_per_device)
        case "dirichlet":
            smallest = MIN_TRAIN + MIN_TEST
            return flwr.DirichletPartitioner(**by_label, alpha=options.dirichlet_alpha, min_partition_size=smallest)
        case "pathological":
            return flwr.PathologicalPartitioner(
                **by_label,
                num_classes_per_partition=options.classes_per_device,
                class_assignment_mode="deterministic",
                shuffle=True,
            )
        case "natural":
            return _natural_ids("device")
        case name:
            return _by_class_name(name, options, {"num_partitions": devices, "seed": seed}, columns)


def _natural_ids(column: str) -> Any:
    """Returns a partitioner that divides like NaturalIdPartitioner, but without the latter's progress bar."""
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    return GroupedNaturalIdPartitioner(partition_by=column, group_size=1, sort_unique_ids=True)


def _by_class_name(name: str, options: DataOptions, ours: dict[str, int], columns: dict[str, Any]) -> Any:
    """Returns the partitioner of flwr-datasets with this name and the arguments of `data.partition-args`."""
    from flwr_datasets import partitioner as flwr

    kind = getattr(flwr, name)
    known = parameters([kind.__init__])
    taken = {key: annotation for key, annotation in known.items() if key not in OURS}
    written = f"data.partition-args = {options.partition_args!r:.200}"
    args: dict[str, Any] = {key: _table(value) for key, value in parse_args(options.partition_args).items()}
    try:
        require_taken(args, taken, name)
    except ValueError as error:
        raise DataError(f"data.partition-args = {error}") from None
    if "partition_by" in taken:
        args["partition_by"] = column = options.divided_by
        if column not in columns or column == "position":
            accepted = ", ".join(sorted(columns.keys() - {"position"}))
            raise DataError(f"{written}: these images have no {column!r} to partition by; accepted: {accepted}")
    if name == "NaturalIdPartitioner":
        return _natural_ids(args["partition_by"])
    arguments = {key: value for key, value in ours.items() if key in known} | {
        key: _converted(value, taken[key]) for key, value in args.items()
    }
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:  # an argument is missing or out of range
        why = " ".join(str(error).split()).removeprefix(f"{name}.__init__() ")
        raise DataError(f"{written}: {why}") from None


def _table(value: Any) -> Any:
    """Returns the rows of ``1/2;3/4`` as a tuple of tuples; anything else unchanged."""
    if not isinstance(value, str) or ";" not in value:
        return value
    rows = [parse_args(f"row={row}")["row"] for row in value.split(";") if row.strip()]
    return tuple(row if isinstance(row, tuple) else (row,) for row in rows)


def _converted(value: Any, annotation: Any) -> Any:
    """Returns a value in the annotated type: tuples as an array or a list, and a number as a list of one if needed."""
    if "ndarray" in str(annotation) and isinstance(value, tuple) and isinstance(value[0], tuple):
        return np.array(value)
    return list(value) if isinstance(value, tuple) else [value] if is_list(annotation) else value
