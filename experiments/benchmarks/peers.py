"""The same networks in PyTorch, for tests and for speed.py."""

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import recipe_peer
from experiments.benchmarks.serve import serve


def import_torchvision():
    """Import torchvision, without its C operators if they are built for another PyTorch."""
    try:
        import torchvision
    except RuntimeError:  # 'operator torchvision::nms does not exist': models are pure Python
        library = torch.library.Library('torchvision', 'DEF')
        for name in ('nms', 'qnms'):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        import_torchvision.library = library  # keeps its definitions alive
        import torchvision

    return torchvision


def conv_norm(features_in: int, features_out: int, kernel: int, stride=1, dilation=1):
    """Two layers: convolution and BatchNorm."""
    pad = dilation * (kernel - 1) // 2
    return (
        nn.Conv2d(features_in, features_out, kernel, stride, pad, dilation, bias=False),
        nn.BatchNorm2d(features_out),
    )


class Block(nn.Module):
    """ResNet's bottleneck block, or its block of two 3x3s."""

    def __init__(self, features_in, width, stride, dilation, project, bottleneck):
        super().__init__()
        features = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1, self.bn1 = conv_norm(features_in, width, 1)
            self.conv2, self.bn2 = conv_norm(width, width, 3, stride, dilation)
            self.conv3, self.bn3 = conv_norm(width, features, 1)
        else:
            self.conv1, self.bn1 = conv_norm(features_in, width, 3, stride, dilation)
            self.conv2, self.bn2 = conv_norm(width, width, 3, 1, dilation)
        self.relu = nn.ReLU()
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(*conv_norm(features_in, features, 1, stride))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, 'conv3'):
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + (self.downsample(x) if self.downsample else x))


class PyramidPool(nn.Module):
    def __init__(self, features_in, bins=(1, 2, 3, 6)):
        super().__init__()
        width = features_in // len(bins)
        self.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), *conv_norm(features_in, width, 1), nn.ReLU())
            for n in bins
        )

    def forward(self, x):
        size = x.shape[2:]
        up = functools.partial(
            nn.functional.interpolate, size=size, mode='bilinear', align_corners=True
        )
        return torch.cat([x, *(up(branch(x)) for branch in self.features)], dim=1)


def head(features_in: int, features: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_norm(features_in, features, 3),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.Conv2d(features, classes, 1),
    )


class PSPNet(nn.Module):
    """Zhao et al. 2017 with semseg's names, written from the paper: output stride 8.

    The backbone is 'resnet50' or 'resnet101' with semseg's stem of three 3x3s, 'resnet18' with one
    7x7, or torchvision's 'vgg16' without its last two poolings and with block 5 dilated.
    """

    def __init__(self, backbone: str, classes: int):
        super().__init__()
        if backbone == 'vgg16':
            # In torchvision's numbering: the layers to pool4, where the auxiliary head is.
            layers = import_torchvision().models.vgg16(weights=None).features
            layers[23] = layers[30] = nn.Identity()
            for n in (24, 26, 28):
                layers[n] = nn.Conv2d(512, 512, 3, padding=2, dilation=2)
            for layer in layers:
                if isinstance(layer, nn.ReLU):
                    layer.inplace = False
            self.features, self.split = layers, 24
            widths = (512, 512)
        else:
            bottleneck = backbone != 'resnet18'
            if bottleneck:
                self.layer0 = nn.Sequential(
                    *conv_norm(3, 64, 3, 2), nn.ReLU(), *conv_norm(64, 64, 3), nn.ReLU(),
                    *conv_norm(64, 128, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                )  # fmt: skip
            else:
                self.layer0 = nn.Sequential(*conv_norm(3, 64, 7, 2), nn.ReLU())
                self.layer0.append(nn.MaxPool2d(3, 2, 1))
            depths = {
                'resnet18': (2, 2, 2, 2),
                'resnet50': (3, 4, 6, 3),
                'resnet101': (3, 4, 23, 3),
            }
            width_in = 128 if bottleneck else 64
            geometry = zip(
                (64, 128, 256, 512), (1, 2, 1, 1), (1, 1, 2, 4), depths[backbone], strict=True
            )
            for number, (width, stride, dilation, depth) in enumerate(geometry, start=1):
                blocks, width_out = [], 4 * width if bottleneck else width
                for i in range(depth):
                    project = i == 0 and (stride > 1 or width_in != width_out)
                    shape = (stride if i == 0 else 1, dilation, project, bottleneck)
                    blocks.append(Block(width_in, width, *shape))
                    width_in = width_out
                setattr(self, f'layer{number}', nn.Sequential(*blocks))
            widths = (width_in // 2, width_in)
        self.ppm = PyramidPool(widths[1])
        self.cls = head(2 * widths[1], 512, classes)
        self.aux = head(widths[0], 256, classes)

    def forward(self, image):
        up = functools.partial(
            nn.functional.interpolate, size=image.shape[2:], mode='bilinear', align_corners=True
        )
        if hasattr(self, 'features'):
            middle = self.features[: self.split](image)
            x = self.features[self.split :](middle)
        else:
            middle = self.layer3(self.layer2(self.layer1(self.layer0(image))))
            x = self.layer4(middle)
        out = {'out': up(self.cls(self.ppm(x)))}
        if self.training:
            out['aux'] = up(self.aux(middle))
        return out


def create(name: str, classes: int) -> nn.Module:
    """The network of a case of speed.py; it returns {'out', 'aux'} or one tensor."""
    if name.startswith('pspnet_'):
        return PSPNet(name.removeprefix('pspnet_'), classes)
    if name == 'deeplabv3_resnet50':
        make = import_torchvision().models.segmentation.deeplabv3_resnet50
        return make(weights=None, weights_backbone=None, num_classes=classes, aux_loss=True)
    if name.startswith('unet_'):
        import_torchvision()
        import segmentation_models_pytorch as smp

        return smp.Unet(name.removeprefix('unet_'), encoder_weights=None, classes=classes)
    raise ValueError(f'{name!r} is not a network of this file')


def outputs(module: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    out = module(image)
    return out if isinstance(out, dict) else {'out': out}


def use_tf32(on: bool) -> None:
    """Whether products and convolutions of float32 use TensorFloat-32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_step(
    module: nn.Module,
    image: torch.Tensor,
    labels: torch.Tensor,
    *,
    train: bool,
    dtype: str,
    mode: str,
    recipe: Mapping[str, Any] | None = None,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(step, the same uncompiled): forward, and in training backward and SGD with momentum.

    `mode` contains 'compile' for torch.compile and 'channels_last' for that layout. With `recipe`
    the step is that of recipe_peer.py.
    """
    device = image.device.type
    if 'channels_last' in mode:
        module = module.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    module.train(train)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step(run):
        with (
            torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'),
            torch.set_grad_enabled(train),
        ):
            out = outputs(run, image)
        if train:
            loss = nn.functional.cross_entropy(out['out'].float(), labels)
            if 'aux' in out:
                loss = loss + 0.4 * nn.functional.cross_entropy(out['aux'].float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    run = torch.compile(module) if 'compile' in mode else module
    if recipe:
        of_recipe = functools.partial(
            recipe_peer.make_step, module, image_BCHW=image, labels_BHW=labels, recipe=recipe
        )
        return of_recipe(run), of_recipe(module)
    return functools.partial(step, run), functools.partial(step, module)


def main() -> None:
    """A case in one mode of PyTorch: eager or compiled, channels last or not."""
    case = json.loads(sys.argv[1])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    module = create(case['peer'], case['classes']).to(device)
    rng = np.random.default_rng(0)
    shape = (case['batch'], 3, case['size'], case['size'])
    image = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(device)
    labels = torch.from_numpy(rng.integers(0, case['classes'], (shape[0], *shape[2:]))).to(device)
    use_tf32(False)  # the reference is exact
    with torch.no_grad():
        module.eval()
        out = outputs(module, image)['out']
    use_tf32(True)
    state = {k: v.cpu().numpy() for k, v in module.state_dict().items() if v.ndim}
    np.savez(case['exchange'] + '.weights.npz', **state)
    in_last = [x.cpu().numpy().transpose(0, 2, 3, 1) for x in (image, out)]
    np.savez(case['exchange'] + '.out.npz', image=in_last[0], out=in_last[1])

    options = {key: case.get(key) for key in ('train', 'dtype', 'mode', 'recipe')}
    step, uncompiled = make_step(module, image, labels, **options)

    def step_and_wait():
        step()
        synchronize()

    with FlopCounterMode(display=False) as counter:
        uncompiled()
    start = time.perf_counter()
    step_and_wait()
    info = {
        'parameters': sum(p.numel() for p in module.parameters()),
        'compile_seconds': time.perf_counter() - start,
        'flops': counter.get_total_flops(),
        'matmul_peak': matmul_peak(device, case['dtype']),
        'versions': {'torch': torch.__version__},
    }
    peak = torch.cuda.max_memory_allocated if device == 'cuda' else None
    serve(step_and_wait, info, peak)


def matmul_peak(device: str, dtype: str) -> float:
    """The best FLOP/s of five products of two 2048 x 2048 (on a GPU 8192 x 8192) matrices."""
    n = 8192 if device == 'cuda' else 2048
    x = torch.ones((n, n), dtype=getattr(torch, dtype), device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x @ x
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


if __name__ == '__main__':
    main()
