"""One training update: the state, the loss, and the pure step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.data import volumes
from pspnet_jax.data.augment import augment
from pspnet_jax.models.convolution import CONVOLVED
from pspnet_jax.models.layers import adaptive_pools, global_indices, resize
from pspnet_jax.runtime import compilation
from pspnet_jax.training import losses

# (key, image H W C, mask H W) -> (image, mask), traced in the compiled step.
AugmentFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# (logits B h w K, labels B h w of the global batch) -> scalar, traced in the compiled step.
LossFn = Callable[[jax.Array, jax.Array], jax.Array]
# A network's output: logits B h w K, and its backbone's last feature map or None.
Seen = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """An update's options from the config; `loss`, `augment` and `distill` are its sections."""

    seed: int
    loss: Mapping[str, Any]
    augment: Mapping[str, Any]
    distill: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: int = 0  # neighbours on each side, whose channels are part of the images
    # The gradient is the mean over n micro-batches in one compiled loop, each of every n-th
    # example. BatchNorm sees one micro-batch at a time.
    accumulate: int = 1
    # 'pointwise': keep the outputs of convolutions for the gradient, and recompute what lies
    # between them, mostly BatchNorm and ReLU.
    remat: str = 'none'
    ema_decay: float = 0.0
    # 'skip': after a NaN or infinite loss or gradient only the step changes, and the metric
    # 'skipped' is 1.
    nan_policy: str = 'stop'


@struct.dataclass
class TrainState:
    """All that a step changes, and the teacher's variables.

    `ema_params` is the average of the parameters, or None; it is evaluated with the current
    `batch_stats`, which are not averaged. A step does not change the teacher's variables: they are
    here to be arguments of the program instead of constants in it. Checkpoints leave them out.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    teacher: Any = None


def create_state(model: nn.Module, tx, *, seed: int, channels: int, ema: bool) -> TrainState:
    """Random parameters from `seed` for images of `channels` channels."""

    def make(key: jax.Array) -> TrainState:  # one program: on a GPU each small one takes 0.1 s
        image = jnp.zeros((1, 64, 64, channels), jnp.float32)  # no parameter depends on the size
        variables = model.init(key, image, train=False)
        params = variables['params']
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get('batch_stats', {}),
            opt_state=tx.init(params),
            ema_params=params if ema else None,
        )

    return compilation.jit(make)(jax.random.key(seed))


def segmentation_loss(
    out: dict[str, jax.Array],
    labels_BHW: jax.Array,
    *,
    aux: float,
    ignore_label: int,
    axis_name: str | None,
    extra: dict[str, float] | None = None,
    loss_fn: LossFn | None = None,
    **knobs: Any,
) -> jax.Array:
    """The sum of `losses.TERMS` and `loss_fn`, plus `aux` times the same for every other output.

    `knobs` are the other keys of the config's section `loss`: the weight of each term (0: it is not
    computed) and the terms' arguments. `extra` holds the weights of terms without a key. `loss_fn`
    sees the logits and labels of the whole batch on any number of devices. Smaller logits are
    compared with the labels at the centres of their cells, which is where `infer.probabilities`
    puts them when it enlarges them. Labels are never interpolated.
    """
    terms = {name: knobs[name] for name in losses.TERMS if name in knobs} | (extra or {})

    def one_head(logits_BhwK):
        labels_Bhw = labels_at(labels_BHW, logits_BhwK.shape[1:3])
        shared = {'ignore_label': ignore_label, 'axis_name': axis_name}
        total: Any = 0.0
        for name, weight in terms.items():
            if weight:
                loss, own = losses.TERMS[name]
                options = {argument: knobs[knob] for argument, knob in own.items()}
                total += weight * loss(logits_BhwK, labels_Bhw, **options, **shared)
        if loss_fn is not None:
            total += loss_fn(*(losses.gather(x, axis_name) for x in (logits_BhwK, labels_Bhw)))
        return total

    total = one_head(out['logits'])
    if aux:
        total += aux * sum(one_head(x) for name, x in out.items() if name != 'logits')
    return total


def labels_at(labels_BHW: jax.Array, size: tuple[int, int]) -> jax.Array:
    """B h w: the labels at the centres of h x w cells, as in `volumes.resize_labels`."""
    rows, columns = map(volumes.centres, size, labels_BHW.shape[1:])
    return labels_BHW[:, rows][:, :, columns]


def forward(model: nn.Module, variables, image_BHWC: jax.Array, *, features: bool, **options):
    """(outputs, batch statistics, features) of a network in training or inference.

    With `features`, these are its backbone's last feature map, B h w C; else None.
    """

    def is_backbone(module: nn.Module, method: str) -> bool:
        return module.path == ('backbone',) and method == '__call__'

    out, updates = model.apply(
        variables,
        image_BHWC,
        mutable=['batch_stats', 'intermediates'],
        capture_intermediates=is_backbone if features else False,
        **options,
    )
    # The last call: deeplab_v2 calls it once per scale, ending with the largest.
    last = updates['intermediates']['backbone']['__call__'][-1][32] if features else None
    return out, updates.get('batch_stats', {}), last


def teacher_losses(
    seen: Seen,
    taught: Seen,
    labels_BHW: jax.Array,
    options: Mapping[str, Any],
    *,
    ignore_label: int,
    axis_name: str | None,
) -> dict[str, jax.Array]:
    """{'distillation', 'pairwise'}: the weighted terms that the teacher adds to the loss.

    `options` is the config's section `distill`. The teacher's logits are resized to the student's.
    The affinities are between `nodes` x `nodes` cells, averages of the feature maps;
    image-segmentation-keras takes maxima of 4 x 4 features.
    """
    parts, (logits_BhwK, features), (teacher_logits, teacher_features) = {}, seen, taught
    if weight := options['weight']:
        size = logits_BhwK.shape[1:3]
        parts['distillation'] = weight * losses.distillation(
            logits_BhwK,
            resize(teacher_logits, size, align_corners=False),
            labels_at(labels_BHW, size),
            loss=options['loss'],
            temperature=options['temperature'],
            ignore_label=ignore_label,
            axis_name=axis_name,
        )
    if pairwise := options['pairwise']:
        nodes = (options['nodes'],)
        cells = [
            adaptive_pools(x.astype(jnp.float32), nodes)[0] for x in (features, teacher_features)
        ]
        parts['pairwise'] = pairwise * losses.pairwise_affinity(*cells, axis_name=axis_name)
    return parts


def augmented(
    key: jax.Array,
    batch: dict[str, jax.Array],
    options: StepOptions,
    augment_fn: AugmentFn | None,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    """(images, masks) of the batch, each example changed by `augment` and then `augment_fn`."""
    index_B = global_indices(batch['image'].shape[0], axis_name)
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B)
    filled = {'ignore_label': options.loss['ignore_label'], 'context': options.context}

    def change(key, image_HWC, mask_HW):
        image_HWC, mask_HW = augment(key, image_HWC, mask_HW, options.augment, **filled)
        if augment_fn is not None:
            own_key = jax.random.fold_in(key, 1000)  # differs from all keys that `augment` uses
            image_HWC, mask_HW = augment_fn(own_key, image_HWC, mask_HW)
        return image_HWC, mask_HW

    return jax.vmap(change)(keys_B, batch['image'], batch['mask'])


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    options: StepOptions,
    augment_fn: AugmentFn | None = None,
    loss_fn: LossFn | None = None,
    teacher: nn.Module | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from {'image': B H W C, 'mask': B H W}; metrics: loss, gradient_norm.

    Randomness is a function of seed, step and the example's place in the global batch.
    `augment_fn` changes each example after `augment`; `loss_fn` is added to the config's losses.
    `teacher` sees the same images in inference mode, with the variables `state.teacher`; the
    metrics include its terms of the loss.
    """
    if axis_name is not None:
        model = models.over_axis(model, axis_name)  # BatchNorm and dropout over all devices
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.key(options.seed), state.step)
    )
    image, mask = augmented(augment_key, batch, options, augment_fn, axis_name)
    features = teacher is not None and options.distill['pairwise'] > 0

    def total_loss(params, batch_stats, image, mask, taught, key):
        variables, parts = {'params': params, 'batch_stats': batch_stats}, {}
        drawn = {'train': True, 'rngs': {'dropout': key}}
        out, batch_stats, last = forward(model, variables, image, features=features, **drawn)
        loss = segmentation_loss(out, mask, axis_name=axis_name, loss_fn=loss_fn, **options.loss)
        if teacher is not None:
            shared = {'ignore_label': options.loss['ignore_label'], 'axis_name': axis_name}
            parts = teacher_losses((out['logits'], last), taught, mask, options.distill, **shared)
        return loss + sum(parts.values()), (batch_stats, parts)

    if options.remat == 'pointwise':
        keep = jax.checkpoint_policies.save_only_these_names(CONVOLVED)
        total_loss = jax.checkpoint(total_loss, policy=keep)
    elif options.remat != 'none':
        raise ValueError(f"train.remat {options.remat!r} is not one of 'none', 'pointwise'")

    def micro_step(carry, micro):
        (batch_stats, i), taught = carry, None
        if teacher is not None:  # outside the function that is differentiated and recomputed
            out, _, last = forward(teacher, state.teacher, micro[0], features=features, train=False)
            taught = (out['logits'], last)
        (loss, (batch_stats, parts)), grads = jax.value_and_grad(total_loss, has_aux=True)(
            state.params, batch_stats, *micro, taught, jax.random.fold_in(dropout_key, i)
        )
        return (batch_stats, i + 1), ({'loss': loss, **parts}, grads)

    if (k := options.accumulate) == 1:
        (batch_stats, _), (metrics, grads) = micro_step((state.batch_stats, 0), (image, mask))
    else:
        # B -> k B/k by stride, so that each device keeps its own examples.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, k, *x.shape[1:]), 1, 0), (image, mask)
        )
        (batch_stats, _), stacked = jax.lax.scan(micro_step, (state.batch_stats, 0), micro)
        metrics, grads = jax.tree.map(lambda x: x.mean(axis=0), stacked)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    return apply_gradients(state, batch_stats, grads, metrics, tx, options)


def apply_gradients(
    state: TrainState,
    batch_stats: Any,
    grads: Any,
    metrics: dict[str, jax.Array],
    tx: optax.GradientTransformation,
    options: StepOptions,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state after an update by these gradients, metrics with the gradient's norm)."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        n = state.step  # without this warm-up the average would start from random heads
        decay = jnp.minimum(options.ema_decay, (1.0 + n) / (10.0 + n))
        ema_params = optax.incremental_update(params, ema_params, 1.0 - decay)
    metrics = {**metrics, 'gradient_norm': optax.tree.norm(grads)}
    changed = (params, batch_stats, opt_state, ema_params)
    if options.nan_policy == 'skip':
        sound = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
        before = (state.params, state.batch_stats, state.opt_state, state.ema_params)
        changed = jax.tree.map(lambda new, old: jnp.where(sound, new, old), changed, before)
        metrics['skipped'] = 1.0 - sound
    return TrainState(state.step + 1, *changed, teacher=state.teacher), metrics


def bind_step(
    config: ConfigDict,
    model: nn.Module,
    tx,
    *,
    augment_fn: AugmentFn | None = None,
    loss_fn: LossFn | None = None,
    teacher: nn.Module | None = None,
    **changes: Any,
) -> Callable:
    """`train_step(state, batch)` with the config's options; `changes` replace some."""
    sections, train = config.to_dict(), config.train
    decided = StepOptions(
        seed=config.seed,
        loss=sections['loss'],
        augment=sections['augment'],
        distill=sections['distill'],
        context=config.data.context,
        accumulate=train.accumulate,
        remat=train.remat,
        ema_decay=train.ema_decay,
        nan_policy=train.nan_policy,
    )
    return functools.partial(
        train_step,
        model=model,
        tx=tx,
        options=dataclasses.replace(decided, **changes),
        augment_fn=augment_fn,
        loss_fn=loss_fn,
        teacher=teacher,
    )
