"""The command line of jobs/train.py."""

from __future__ import annotations

import dataclasses
import threading
from typing import Annotated, Any, Literal

import tyro

from jobs.cli.command import GpuChoice
from jobs.cli.workers import WorkersChoice
from model.recipe import RECIPES, Recipe
from pipeline.storage.locations import check_writable, join


def recipe_value(name: str) -> Any:
    """Shows a field's value in each recipe as the default of the flag that changes it."""
    values = {recipe: getattr(made, name) for recipe, made in RECIPES.items()}
    default = values.pop("default")
    others = "".join(f"; {recipe}: {value}" for recipe, value in values.items() if value != default)
    return tyro.conf.arg(help_behavior_hint=f"(default: {default}{others})")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to train on, and where the run is kept."""

    data: str
    """The shard set, made by jobs/shard_imagenet.py: a folder (on a cluster, one that every node sees) or a URL."""
    storage: str
    """Where runs are kept: a folder, or a URL that every node can write (s3://, gs://)."""
    name: str
    """The run's name: its checkpoints and events are in STORAGE/NAME."""
    stage: str | None = None
    """A folder on each node's own disk to copy the set to, once per node: for a URL or a slow mount."""
    stage_as: Literal["jpeg", "pixels"] = "jpeg"
    """What to keep there: the JPEGs, or their pixels, decoded once, so that an epoch only cuts, mirrors and
    shifts. Pixels take 196,608 bytes an image, 262 GB for ImageNet: for memory or fast disks that hold so much."""


@dataclasses.dataclass(frozen=True)
class HardwareOptions:
    """What trains."""

    workers: WorkersChoice = None
    """How many processes train, or from how many to how many; None: one per GPU of the cluster, or one on CPU."""
    resize_seconds: float = 60.0
    """Under --workers MIN:MAX, from one look whether there is room for more to the next; to grow costs the steps since
    the last checkpoint."""
    gpus: GpuChoice = None
    """Train on GPUs, or on CPU; None: on GPUs if the cluster has any."""
    cpus_per_worker: int | None = None
    """Cores of each worker: the cluster's, shared evenly."""
    micro_batch: int = 1024
    """At most this many images per worker are in the network at once; a larger part is accumulated."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPU, float32 on CPU."""
    gpu_decoder: Literal["cuda", "hardware"] = "cuda"
    """What decodes JPEGs on a GPU. cuda: the same pixels on every GPU. hardware: the JPEG engine of A100, H100 and
    later, which leaves the GPU to the network; its pixels differ from cuda's by some levels, so a run keeps to one."""


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """How the network learns: a recipe, and what to change of it."""

    recipe: Literal["default", "paper", "large-batch", "batchnorm"] = "default"
    """paper: to the letter; default: but for an initial hidden bias of 0.1, with which it learns reliably; large-batch:
    LARS, for thousands of images a step; batchnorm: batch normalization for LRN. model/recipe.py has each in full."""
    batch_size: Annotated[int | None, recipe_value("batch_size")] = None
    """Images per step over all workers."""
    epochs: Annotated[int | None, recipe_value("epochs")] = None
    """Stop after so many, if the schedule has not stopped before."""
    lr: Annotated[float | None, recipe_value("lr")] = None
    """Learning rate at the start."""
    weight_decay: Annotated[float | None, recipe_value("weight_decay")] = None
    """Of the weights, and by `biases` of the biases."""
    biases: Annotated[Literal["paper", "caffe"] | None, recipe_value("biases")] = None
    """paper: as the weights; caffe: twice their rate and no decay."""
    optimizer: Annotated[Literal["sgd", "lars"] | None, recipe_value("optimizer")] = None
    """sgd: the paper's update; lars: with a rate scaled for each layer."""
    schedule: Annotated[Literal["plateau", "poly"] | None, recipe_value("schedule")] = None
    """plateau: a tenth of the rate when validation stops improving; poly: falling over all epochs."""
    warm_up_epochs: Annotated[int | None, recipe_value("warm_up_epochs")] = None
    """Epochs over which the rate rises linearly at the start."""
    normalization: Annotated[Literal["lrn", "caffe", "caffenet", "batch"] | None, recipe_value("normalization")] = None
    """lrn: the paper's; caffe, caffenet: as the two networks of Caffe; batch: batch normalization instead."""
    dropout: Annotated[float | None, recipe_value("dropout")] = None
    """On the outputs of fc6 and fc7."""
    hidden_bias: Annotated[float | None, recipe_value("hidden_bias")] = None
    """Initial bias of conv2, conv4, conv5, fc6 and fc7."""
    groups: Annotated[Literal[1, 2] | None, recipe_value("groups")] = None
    """1: one tower; 2: the paper's two."""
    color: Annotated[Literal["eigenvalue", "std", "none"] | None, recipe_value("color")] = None
    """Scale of the color shift: by the paper's eigenvalues, or by the 2012 source's standard deviations."""
    plateau_metric: Annotated[Literal["top1_error", "loss"] | None, recipe_value("plateau_metric")] = None
    """What must improve on the validation set, or the rate drops."""
    patience: Annotated[int | None, recipe_value("patience")] = None
    """Epochs without an improvement before the rate drops."""
    gradient_compression: Annotated[Literal["none", "bfloat16"] | None, recipe_value("gradient_compression")] = None
    """What workers exchange: none: float32; bfloat16: half the bytes, for a network that is the limit."""
    seed: Annotated[int | None, recipe_value("seed")] = None
    """Of weights, plan and dropout."""


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When the run is saved."""

    checkpoint_every: int = 0
    """Steps between checkpoints within an epoch, besides the one at its end."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints within an epoch, besides the others."""
    keep: int = 2
    """How many checkpoints to keep: those with the lowest validation error. The newest two always stay."""
    from_checkpoint: str | None = None
    """Where a run that has no checkpoint yet begins: a checkpoint_* folder of another run with the same settings and
    data; a path or URL."""
    init_from: str | None = None
    """Whose weights a run begins with that has no checkpoint yet: a checkpoint_* folder or a run's folder (its best
    checkpoint); a path that every node sees, or a URL. The classes may be others: for another number of them, the last
    layer is made anew."""


@dataclasses.dataclass(frozen=True)
class FaultOptions:
    """What to do when something fails."""

    max_failures: int = 3
    """How often to start again from the last checkpoint after losing a worker or a node."""
    hang_seconds: float = 120.0
    """A worker that is longer about one batch's images, or does not answer for so long, hangs: it is ended,
    which counts among --max-failures. Give more if the disk may be away for longer and come back."""
    collective_seconds: int = 600
    """A worker that waits longer for the others in one exchange, as on a wedged network, fails, which counts among
    --max-failures. More than --hang-seconds, so that a worker that hangs is found first."""


@dataclasses.dataclass(frozen=True)
class LoggingOptions:
    """What is told of the run."""

    log_every: int = 20
    """Steps between progress lines."""
    tracker: Literal["mlflow", "wandb"] | None = None
    """Send metrics to MLflow (at MLFLOW_TRACKING_URI) or Weights & Biases (by WANDB_API_KEY) as well as to
    TensorBoard's events."""


# A dataclass takes the fields of its last base first.
@dataclasses.dataclass(frozen=True)
class TrainConfig(LoggingOptions, FaultOptions, CheckpointOptions, RecipeOptions, HardwareOptions, DataOptions):
    """The whole command line. What is None follows from the recipe or from the machine."""

    def __post_init__(self) -> None:
        for field in ("micro_batch", "cpus_per_worker", "log_every", "keep", "collective_seconds"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"--{field.replace('_', '-')} is {value}; it must be at least 1")
        for field in ("checkpoint_every", "max_failures"):
            if getattr(self, field) < 0:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must not be below 0")
        check_writable("--storage", self.storage)
        if self.stage_as == "pixels" and self.stage is None:
            raise ValueError("--stage-as pixels needs --stage, a folder on each node's own disk")
        for field in ("checkpoint_minutes", "resize_seconds"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"--{field.replace('_', '-')} is {value}; it must be above 0")
        if not 0 < self.hang_seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"--hang-seconds is {self.hang_seconds}; it must be above 0, and a time that can pass")
        if self.init_from is not None and self.from_checkpoint is not None:
            raise ValueError(
                "--init-from and --from-checkpoint exclude each other: the first begins a new training with given "
                "weights, the second goes on with one; give one of them"
            )
        if not self.name or self.name.startswith(".") or "/" in self.name:
            raise ValueError(f"--name is {self.name!r}; it names a folder in --storage, so it must be a plain word")

    @property
    def run(self) -> str:
        """The run's folder, a path or URL."""
        return join(self.storage, self.name)

    def make_recipe(self) -> Recipe:
        """The named recipe with what the command line changes.

        Raises:
            ValueError: if it changes what the recipe's schedule does not ask, or its batch is too small to share.
        """
        recipe = dataclasses.replace(RECIPES[self.recipe], **self.changes())
        if recipe.schedule != "plateau":
            idle = [name for name in ("plateau_metric", "patience") if getattr(self, name) is not None]
            if idle:
                flag = f"--{idle[0].replace('_', '-')}"
                raise ValueError(f"{flag} does nothing under the {recipe.schedule} schedule: leave it out")
        if self.workers is not None:
            self.workers.check_more_than(recipe.batch_size)
        return recipe

    def changes(self) -> dict[str, Any]:
        """The fields of the recipe that the command line sets."""
        given = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Recipe)}
        return {name: value for name, value in given.items() if value is not None}


def from_groups(
    data: DataOptions,
    hardware: HardwareOptions,
    recipe: RecipeOptions,
    checkpoint: CheckpointOptions,
    fault: FaultOptions,
    logging: LoggingOptions,
) -> TrainConfig:
    """The configuration, of the groups that --help shows.

    Raises:
        ValueError: if a value is wrong, also one of the recipe's.
    """
    groups = (data, hardware, recipe, checkpoint, fault, logging)
    config = TrainConfig(**{name: value for group in groups for name, value in vars(group).items()})
    config.make_recipe()
    return config
