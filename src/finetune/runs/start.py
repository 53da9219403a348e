"""A run begins: what can be wrong is looked at, its folder is made, it is trained."""

import dataclasses
import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune.base.allocator import freed_memory_kept
from finetune.base.device import (
    module_to_device,
    numerics_put_back,
    pick_device,
    said_too_late,
    set_numerics,
    to_device,
)
from finetune.base.events import Begun
from finetune.base.lock import alone_in_process
from finetune.base.words import with_option, without_option
from finetune.data.contents import Contents
from finetune.data.names import by_meaning, meaning, order_of
from finetune.data.open import check_data_effects
from finetune.data.order import key
from finetune.data.preprocess import Preprocessing
from finetune.data.tokens import Tokenization
from finetune.errors import RunError, StoppedEarly, UsageError
from finetune.models.backbones import Backbone
from finetune.models.bundled import knows_glyphs_only
from finetune.models.heads import reorder, rescale
from finetune.models.network import Network, store_frozen
from finetune.models.pooling import give_deterministic_pools
from finetune.models.pretrained import new_network, pretrained
from finetune.models.weights import Weights
from finetune.recipe.effects import check_effects, idle_lines
from finetune.recipe.execution import Machine, Numerics, check_precision
from finetune.recipe.spec import Images, Recipe, located
from finetune.runs.same_data import keep_names
from finetune.runs.startup_table import facts_of
from finetune.store.checkpoint import step_files
from finetune.store.finish_state import outcome_text
from finetune.store.restore import network_from_run, with_other_classes
from finetune.store.run_folder import RunFolder, RunRecord, fill_folder, new_run_id, next_folder
from finetune.store.state import (
    CheckpointState,
    DataFacts,
    Progress,
    generators_put_back,
    seed_generators,
)
from finetune.store.steps import count_steps
from finetune.tasks.doubts import marked_as_wrong
from finetune.training.batchnorm import check_parts, lines_on_parts
from finetune.training.context import RunContext
from finetune.training.data_check import check_copies, leave_out_broken, look
from finetune.training.dataset import Data, check_numbers, open_data, survey_pixels
from finetune.training.loop import train
from finetune.training.optimizer import check_optimizer, find_optimizer
from finetune.training.phase import Phase, start_phase
from finetune.training.setup import Setup, make_loaders
from finetune.training.teacher import taught
from finetune.training.thaws import check_thaws, waiting_text
from finetune.watch.watch import Subject

SHOWN_CLASSES = 10
PHOTO_RECIPE, OTHER_IMAGE_RECIPES = "photo_head", ("photo_head", "vgg_head", "resnet_head")


@dataclass(frozen=True)
class Plan:
    """A new run, as it was asked for.

    Attributes:
        name: of the recipe.
        code: files to keep with the run: the recipe and what it imported from its own folder.
        init_from: "RUN", "RUN:best" or "RUN:latest": start from that run's weights.
        new_classes: that run's classes may be others; what its head knows of the same ones is taken over.
        copy_frozen: copy the frozen weights into the run folder, so that it stands alone.
        skip_broken: look at every sample first, and leave broken ones out.
        place: where the recipe's data lies now, if not where it says.
        command: what to type after `finetune` to do the same again; for people, no secrets.
        chosen: values of the recipe that somebody chose, which are held against what they change; see
            `recipe.effects`.
    """

    recipe: Recipe
    numerics: Numerics
    machine: Machine
    name: str = "run"
    code: tuple[Path, ...] = ()
    init_from: str = ""
    new_classes: bool = False
    copy_frozen: bool = False
    skip_broken: bool = False
    place: str = ""
    command: tuple[str, ...] = ()
    chosen: frozenset[str] = frozenset()


def start(plan: Plan, context: RunContext) -> Progress:
    """Begin a run: in a folder that holds none, in one that died before its first checkpoint, or in none at all.

    Args:
        context: its `folder` is the run's from here on, the next free one below runs/ where none was given.

    Raises:
        FinetuneError: see `train`.
    """
    with surroundings_put_back():
        # What can be wrong is looked at before a folder is made, but for the samples themselves: that may take hours,
        # and a run that is killed there is gone on with like any other.
        setup, weights = new_setup(plan)
        if late := said_too_late(setup.device):
            context.say(late)
        with own_folder(plan, context), context.interruptible(), context.watched():
            lay_out(plan, context, setup, weights)
            setup = taught(setup, context.terminal, context.stop)
            with closing(setup.loaders), closing(start_phase(setup, 0, context)) as phase:
                # Another run's weights come with that run's measured features, and these stay.
                all_files = plan.skip_broken or plan.recipe.data.drop_duplicates
                broken = look(
                    setup, phase.feed, measure=not plan.init_from, all_files=all_files, terminal=context.terminal,
                    stop=context.stop,
                )  # fmt: skip
                data = leave_out_broken(setup.data, broken, plan.skip_broken, context.terminal)
                check_numbers(data, plan.recipe)
                setup = dataclasses.replace(setup, data=data)
                setup = dataclasses.replace(setup, data=check_copies(setup, phase.feed))
                check_parts(setup)
                for line in lines_on_parts(setup):
                    context.say(line)
                say_idle(plan, setup, context)
                context.save_contents(setup.loaders.train.contents)
                seed_generators(key("train", plan.recipe.seed))
                progress = Progress(history=[{"event": "start", "step": 0, "epoch": 0}])
                return run_setup(setup, context, phase, progress)


@contextmanager
def surroundings_put_back() -> Iterator[None]:
    """The block has torch's global state to itself, and leaves it as it was: generators, deterministic algorithms.

    Raises:
        RunError: another thread trains.
    """
    with alone_in_process(), numerics_put_back(), generators_put_back(), freed_memory_kept():
        yield


@contextmanager
def own_folder(plan: Plan, context: RunContext) -> Iterator[None]:
    """The run's folder, made and locked. If the run fails before there is anything to go on from, it goes again.

    Raises:
        UsageError: it cannot be made, or holds files that are not of a run.
        RunError: another process uses it.
    """
    if not context.writes:
        yield
        return
    if context.folder is None:
        context.folder = RunFolder(next_folder(plan.name))
    run = context.folder
    if run.foreign_files():
        raise UsageError(f"--run {run}: holds other files ({run.foreign_files()[0]}); give a new folder")
    run.make()
    with context.locked():
        fresh = not run.exists()
        if run.has_checkpoint():
            raise RunError(f"run {run} was begun by another process meanwhile; go on with: finetune resume {run}")
        try:
            yield
        except StoppedEarly:
            raise
        except Exception:
            # What a tracker raises ends a run that is good, and can be gone on with.
            if fresh and not step_files(run.checkpoints) and not context.watch.was_ended_by_tracker:
                run.remove()
            raise


def lay_out(plan: Plan, context: RunContext, setup: Setup, weights: Weights | None) -> None:
    """Fill the folder of a new run."""
    context.run_id = new_run_id()
    if not context.writes:
        return
    run = context.run
    run.clear()
    record = RunRecord(
        id=context.run_id,
        name=plan.name,
        config=setup.config(),
        settings=dataclasses.asdict(context.settings),
        init_from=plan.init_from,
        new_classes=plan.new_classes,
        copy_frozen=plan.copy_frozen,
        skip_broken=plan.skip_broken,
        command=list(plan.command),
        chosen=sorted(plan.chosen),
    )
    fill_folder(run, record, list(plan.code))
    keep_names(run, setup.data.source)
    store_frozen(run.frozen, weights, setup.freeze.at(0).frozen(), copy=plan.copy_frozen, link=not run.url)
    if isinstance(setup.backbone.preprocessing, Tokenization):
        setup.backbone.preprocessing.write(run.tokenizer)


def new_setup(plan: Plan) -> tuple[Setup, Weights | None]:
    """The setup of a new run, and the file that its frozen tensors are of, if it is one.

    Raises:
        FinetuneError: whatever is wrong with the recipe, the data, the weights or the device.
    """
    recipe, numerics, init_from = plan.recipe, plan.numerics, plan.init_from
    device = pick_device(plan.machine.device)
    check_precision(numerics, device.type)
    find_optimizer(recipe.optimizer.name)
    check_effects(recipe, plan.chosen)
    set_numerics(numerics.deterministic, numerics.tf32)
    recipe_here = located(recipe, plan.place)
    if init_from:
        backbone, network, other = network_from_run(recipe, init_from)
        weights = None
        backbone, preprocessing_of = _decoded_as_asked(recipe, backbone, init_from)
        data = _opened(recipe_here, backbone)
        network, weights_text = _with_classes_of(plan, data, backbone, network, other)
        if isinstance(recipe.data, Images):
            data, backbone = survey_pixels(data, backbone, recipe.data.pixel_range, prepared_by=init_from)
        if data.scale:
            tensors = network.module.state_dict()
            rescale(tensors, network.last_layer_path, other.scale, data.scale)
            network.module.load_state_dict(tensors)
    else:
        backbone, weights, begins_with = pretrained(recipe_here)
        weights_text = weights.text if weights else "random: nothing is pretrained"
        preprocessing_of = weights.preprocessing_of if weights else "its default weights"
        data = _opened(recipe_here, backbone)
        if isinstance(recipe.data, Images):
            is_own = weights is not None and weights.reference == f"bundled:{backbone.name}"
            instead = for_photos(plan) if is_own and knows_glyphs_only(backbone.name) else ""
            data, backbone = survey_pixels(data, backbone, recipe.data.pixel_range, for_photos=instead)
        network = new_network(recipe, backbone, weights, data.output_count, begins_with)
        if network.picked_text and weights is not None and not weights.path.is_dir():
            weights_text += f"; {network.picked_text}"
        if begins_with is not None:  # a part of the file is not the file
            weights, weights_text = None, f"begins as a part of {weights_text}"
    check_numbers(data, recipe)
    if recipe.model.one_logit and data.class_count != 2:
        raise UsageError(f"--one-logit: is for two classes, {recipe.data.place} has {data.class_count}; leave it out")
    check_data_effects(data.source, recipe, plan.chosen)
    freeze = network.freeze_map(recipe.trainable)
    check_thaws(network, recipe, count_steps(recipe, len(data.split.train), Progress()))
    check_optimizer(freeze.ever_trains(), recipe.optimizer, plan.chosen)
    give_deterministic_pools(network.module, device)
    module_to_device(network.module, device)
    loaders = make_loaders(data, plan.machine, device, Contents(data.source))
    setup = Setup(
        recipe, numerics, plan.machine, backbone, network, freeze, data, loaders, device, weights_text,
        preprocessing_of, plan.chosen,
    )  # fmt: skip
    check_parts(setup)
    return setup, weights


def _decoded_as_asked(recipe: Recipe, backbone: Backbone, init_from: str) -> tuple[Backbone, str]:
    """The backbone of another run, with this one's way to decode; whose preprocessing that is, in words."""
    prepared, data = backbone.preprocessing, recipe.data
    if not isinstance(prepared, Preprocessing) or not isinstance(data, Images) or prepared.decode == data.decode:
        return backbone, init_from
    words = f"{init_from}, where decoding was {prepared.decode}"
    return dataclasses.replace(backbone, preprocessing=dataclasses.replace(prepared, decode=data.decode)), words


def _with_classes_of(
    plan: Plan, data: Data, backbone: Backbone, network: Network, other: DataFacts
) -> tuple[Network, str]:
    """The network of another run for the classes of this one; and where its weights are from, in words.

    Raises:
        RunError: that run has other classes, and this one was not told so.
        UsageError: it was told so, and there are none, or they are the same.
    """
    ours, theirs, said = data.source.classes, other.classes, f"from {plan.init_from}"
    order = order_of(ours, theirs)
    if plan.new_classes and (order is not None or not ours or plan.recipe.model.one_logit):
        why = "its classes are those of that run" if order is not None and ours else "no class has a row of its own"
        raise UsageError(f"--new-classes: has no effect with --init-from {plan.init_from}, {why}; leave it out")
    if order is None and not plan.new_classes:
        shown = [", ".join(map(repr, names[:SHOWN_CLASSES])) for names in (theirs, ours)]
        raise RunError(
            f"--init-from {plan.init_from}: trained on other classes ({shown[0]}; here {shown[1]}); --new-classes "
            "takes over what its head knows of those with the same name"
        )
    if order is None:
        known = by_meaning(theirs)
        places = [known.get(meaning(name), -1) for name in ours]
        network = with_other_classes(plan.recipe, backbone, network, places)
        kept = [name for name, place in zip(ours, places, strict=True) if place >= 0]
        said += (
            f"; {len(kept)} of {len(ours)} classes taken over ({', '.join(map(repr, kept[:SHOWN_CLASSES])) or 'none'})"
        )
    elif order != sorted(order):  # one spelling sorts before another
        tensors = network.module.state_dict()
        reorder(tensors, network.last_layer_path, order)
        network.module.load_state_dict(tensors)
    return network, said


def _opened(recipe: Recipe, backbone: Backbone) -> Data:
    """The data without the samples that somebody marked as wrong."""
    data = open_data(recipe, backbone)
    return data.leave_out(marked_as_wrong(recipe.data.without, data.source))


def for_photos(plan: Plan) -> str:
    """What to type for the same with a network that learnt from photographs."""
    words = list(plan.command)
    if not words:
        words = [PHOTO_RECIPE, "--images", plan.recipe.data.place]
    elif Path(words[0]).stem in OTHER_IMAGE_RECIPES:
        words = [PHOTO_RECIPE, *without_option(words[1:], "--backbone")]
    else:
        words = with_option(words, "--backbone", "bundled/mobilenet")
    return shlex.join(["finetune", *words])


def say_idle(plan: Plan, setup: Setup, context: RunContext) -> None:
    """Say what somebody chose and what never comes to pass in this run."""
    steps = count_steps(plan.recipe, len(setup.data.split.train), Progress())
    lines = idle_lines(plan.recipe, plan.chosen, steps.per_epoch, steps.end)
    wanted, there = plan.recipe.data.train_samples, len(setup.data.whole.train)
    if "data.train_samples" in plan.chosen and wanted > there:
        lines.append(
            f"--train-samples {wanted}: there are {there:,} {setup.data.source.noun}s to train on, all are taken"
        )
    workers, method = setup.loaders.train.workers, plan.machine.worker_start
    if method != "auto" and not workers:
        lines.append(f"--worker-start {method}: no worker process is started, so few files are quicker without")
    for line in lines:
        context.say(line)


def run_setup(
    setup: Setup, context: RunContext, phase: Phase, progress: Progress, resumed: CheckpointState | None = None
) -> Progress:
    """Show what is about to happen, then train. The lock is held; everybody who watches is there."""
    tell_of_beginning(setup, context, phase, progress, is_resumed=resumed is not None)
    progress = train(setup, context, phase, progress, resumed)
    if progress.skipped_steps:
        context.watch.say(
            f"fp16: {progress.skipped_steps:,} of {progress.step:,} steps moved nothing, as their gradients were too "
            "large for it; --precision bf16 knows no such limit"
        )
    if waiting := waiting_text(setup.recipe, progress):
        context.watch.say(waiting)
    context.watch.end(progress.status, f"{progress.status}: {outcome_text(progress.best, progress.finish)}")
    return progress


def tell_of_beginning(setup: Setup, context: RunContext, phase: Phase, progress: Progress, *, is_resumed: bool) -> None:
    """Show the facts, and tell everybody who watches what is about to be trained."""
    data, network, watch = setup.data, setup.network, context.watch
    steps = count_steps(setup.recipe, len(data.split.train), progress)
    where = str(context.folder or "")
    facts = facts_of(where, setup, phase)
    watch.terminal.begin(facts, progress.step, steps.end)
    watch.subject = Subject(
        folder=context.folder if context.writes else None,
        run_id=context.run_id,
        classes=data.source.classes,
        source=data.source,
        facts=facts,
        model=network.module,
        head=network.head(),
        last_layer=network.last_layer(),
        example=to_device(setup.backbone.preprocessing.example(1), setup.device),
        report=context.settings.report and context.writes,
    )
    begun = Begun(
        run_id=context.run_id,
        run=where,
        folder=context.folder.path if context.folder else None,
        config=setup.config(),
        facts=facts,
        step=progress.step,
        total_steps=steps.end,
        epochs=steps.epochs,
        is_resumed=is_resumed,
        best_metric=setup.recipe.best_metric,
        best=progress.best,
    )
    watch.begin(begun, setup.device)
