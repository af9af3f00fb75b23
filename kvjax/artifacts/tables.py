"""The sweep's tables: row schemas, checked on write, and the labelled arrays of the netCDF file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from kvjax.artifacts.files import replace_file, write_json_lines
from kvjax.errors import unusable

if TYPE_CHECKING:
    import xarray

SCHEMA_VERSION = 1

_NETCDF = "netcdf4"  # the library that writes and reads netCDF

Rate = float | None  # None where no event falls into it
Number = float | None
ByStage = dict[str, Number]


class _Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MarginSummary(_Row):
    """Distribution of the answer margin over read events, in logits."""

    mean: Number
    std: Number
    p10: Number
    p50: Number
    p90: Number
    share_positive: Rate


class AblatedHead(_Row):
    """A head by the accuracy its ablation costs."""

    layer: int
    head: int
    value: Number
    margin_drop: Number


class LocalizedHead(_Row):
    """A head by its attention to the support value."""

    layer: int
    head: int
    value: Number
    query_attention_mean: Number


class AblatedMlp(_Row):
    """An MLP by the accuracy its ablation costs."""

    layer: int
    value: Number
    margin_drop: Number


class WriteNorm(_Row):
    """Mean L2 norm of an MLP's output."""

    prediction: Number
    support: Number


class CheckpointRow(_Row):
    """One line of `checkpoint_metrics.jsonl` (docs/formats.md); docs/definitions.md says what each number means."""

    schema_version: int
    run_name: str
    seed: int
    step: int
    answer_accuracy: Rate
    heldout_answer_accuracy: Rate
    split_accuracy: dict[str, Rate]
    split_metrics: dict[str, dict[str, Number]]
    slice_accuracy: dict[str, dict[str, Rate]]
    slice_count: dict[str, dict[str, int]]
    difficulty_accuracy: dict[str, Rate]
    answer_margin: Number
    answer_margin_summary: MarginSummary
    answer_entropy: Number
    answer_confidence: Number
    loss: Number
    token_accuracy: Rate
    token_role_accuracy: dict[str, Rate]
    q: Number
    r: Number
    w: Number
    key_selectivity: Number
    recency_selectivity: Number
    birth_flags: dict[str, bool | None]
    lens_answer_accuracy_by_layer: ByStage
    lens_query_key_accuracy_by_layer: ByStage
    lens_support_value_accuracy_by_layer: ByStage
    answer_margin_by_layer: ByStage
    probe_query_key_by_layer: ByStage
    probe_query_key_null_by_layer: ByStage
    probe_query_key_at_support_by_layer: ByStage
    probe_query_key_at_support_null_by_layer: ByStage
    probe_support_value_by_layer: ByStage
    probe_support_value_null_by_layer: ByStage
    probe_answer_value_by_layer: ByStage
    probe_answer_value_null_by_layer: ByStage
    probe_stale_value_by_layer: ByStage
    probe_stale_value_null_by_layer: ByStage
    probe_stale_value_at_support_by_layer: ByStage
    probe_stale_value_at_support_null_by_layer: ByStage
    probe_current_vs_stale_by_layer: ByStage
    probe_current_vs_stale_null_by_layer: ByStage
    residual_drift_by_layer: ByStage
    residual_drift_to_reference_by_layer: ByStage
    top_heads_by_ablation: list[AblatedHead]
    top_heads_by_localization: list[LocalizedHead]
    head_rank_correlation_prev: Number
    top_mlps_by_ablation: list[AblatedMlp]
    mlp_rank_correlation_prev: Number
    mlp_write_norm_by_layer: dict[str, WriteNorm]
    head_turnover: Number
    mlp_turnover: Number
    delta_answer_accuracy: Number
    delta_heldout_answer_accuracy: Number
    delta_answer_margin: Number
    delta_answer_entropy: Number
    delta_answer_confidence: Number
    delta_loss: Number
    delta_q: Number
    delta_r: Number
    delta_w: Number
    delta_key_selectivity: Number
    delta_recency_selectivity: Number
    stabilized: dict[str, bool | None]


class HeadRow(_Row):
    """One line of `component_candidates/heads.jsonl`."""

    step: int
    layer: int
    head: int
    query_attention_mean: Number
    support_attention_mean: Number
    current_value_attention_mean: Number
    stale_attention_mean: Number
    binding_attention_mean: Number
    attention_entropy: Number
    accuracy_drop: Rate
    margin_drop: Number
    accuracy_drop_mean: Rate
    margin_drop_mean: Number
    accuracy_drop_resample: Rate
    margin_drop_resample: Number
    ablations_disagree: bool | None
    direct_logit_attribution: Number
    delta_accuracy_drop: Number
    rank: int


class MlpRow(_Row):
    """One line of `component_candidates/mlps.jsonl`."""

    step: int
    layer: int
    accuracy_drop: Rate
    margin_drop: Number
    accuracy_drop_mean: Rate
    margin_drop_mean: Number
    accuracy_drop_resample: Rate
    margin_drop_resample: Number
    ablations_disagree: bool | None
    direct_logit_attribution: Number
    write_norm_mean: Number
    write_norm_support_mean: Number
    answer_margin_delta_mean: Number
    delta_accuracy_drop: Number
    rank: int


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: type[pydantic.BaseModel]) -> None:
    """Writes rows as JSON lines, atomically, each checked against its schema first."""
    write_json_lines(path, [schema.model_validate(row).model_dump() for row in rows])


def write_datasets(path: Path, groups: Sequence[tuple[str | None, xarray.Dataset]]) -> None:
    """Writes labelled arrays as one netCDF file, atomically.

    Args:
      path: the file.
      groups: (group name, or None for the root; its dataset), the root first.

    Raises:
      InputError: the file cannot be written.
    """
    with replace_file(path) as partial:
        for index, (group, dataset) in enumerate(groups):
            compressed = {
                name: {"zlib": True, "complevel": 1}
                for name, variable in dataset.data_vars.items()
                if variable.ndim and variable.dtype.kind in "fiub"
            }
            mode = "a" if index else "w"
            try:
                dataset.to_netcdf(partial, mode=mode, group=group, engine=_NETCDF, encoding=compressed)
            except RuntimeError as error:  # netCDF4's kind of error, also for a full disk
                raise unusable(path, "a file that can be written", error) from None


def read_dataset(path: Path, *, group: str | None = None, expected: str) -> xarray.Dataset:
    """Returns the labelled arrays of a netCDF file, or of a group of it, in memory.

    Args:
      path: the file.
      group: its group; the root where None.
      expected: what the file should be, for the error.

    Raises:
      InputError: there is no such file, or it is damaged.
    """
    import xarray as xr

    if not path.is_file():
        raise unusable(path, expected, "no such file")
    try:
        with xr.open_dataset(path, engine=_NETCDF, group=group) as dataset:
            return dataset.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise unusable(path, expected, error) from None
