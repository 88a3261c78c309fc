"""Every knob of every experiment, with its default and the reason for it.

The only file that introduces keys: the others call it and change lines. It is locked,
so a misspelt key in a variant is an error and not a knob that nothing reads.
"""

import re
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


# Long, as it is the list of all knobs, which is read from top to bottom.
def get_config(arg: str = '') -> ConfigDict:
    del arg
    config = ConfigDict()
    config.seed = 0  # parameters, order of slices, augmentation, dropout
    config.parallel = 'jit'  # 'jit' over a mesh of all devices, or 'pmap'

    config.model = model = ConfigDict()
    model.name = 'pspnet'  # README: every network and alias
    model.num_classes = 2  # background included
    model.class_names = ()  # of all classes, background first; (): as annotations name them
    model.width = 64  # base channels; the networks' own is 64
    model.dtype = 'float32'  # or 'bfloat16'; parameters and logits stay float32
    # Weights of the backbone: 'imagenet', a file, or hf:REPO[@REVISION][/FILE]; '': random ones.
    model.pretrained = ''
    model.stem = 'cycle'  # pretrained RGB filters for other channels: 'cycle' or 'mean'
    # None: what the network's paper has (pspnet_jax/models/__init__.py).
    # vgg16, vgg16_bn, resnet18 .. 152, mobilenet_v2, efficientnet_lite0 .. 4
    model.backbone = placeholder(str)
    model.output_stride = placeholder(int)  # 8, 16, 32, where the network leaves a choice
    model.dropout = placeholder(float)  # before the classifiers
    model.rates = placeholder(tuple)  # dilations of the ASPP
    model.multi_grid = placeholder(tuple)  # times the dilation of ResNet's layer4, in turn
    model.fc_features = placeholder(int)  # of fc6 and fc7; light: 512; none: 0
    model.dilate_first_block = placeholder(bool)  # True: semseg; False: torchvision
    model.deep_stem = placeholder(bool)  # semseg's three 3x3s in place of ResNet's 7x7
    model.stride_in_1x1 = placeholder(bool)  # of ResNet's bottlenecks: Caffe's and Keras' weights
    model.same_padding = placeholder(bool)  # of mobilenet_v2: Keras' weights
    model.bins = (1, 2, 3, 6)  # pyramid levels of pspnet; (): no pyramid
    model.aux_head = True  # of pspnet, fcn, deeplab_v3: second head, training only
    model.deep_supervision = False  # of unet: heads at strides 2, 4, 8 too, training only
    model.context = 'basic'  # module of dilated: 'basic', 'large', 'none'
    model.scales = (0.5, 0.75, 1.0)  # at which deeplab_v2 reads the image
    model.batch_norm = True  # of unet; the paper has none
    model.variant = 'paper'  # of deeplab_v3 and v3plus: 'torchvision' and 'smp', their own

    config.data = data = ConfigDict()
    data.name = 'phantom'  # folder, lgg, phantom; a page may add to data.sources.SOURCES
    data.source = ''  # folder of the raw data; '' with lgg: fetched from Kaggle
    data.root = ''  # where the built data set is kept; '': tfds' own folder
    data.images = ('images',)  # of 'folder': one, or one a channel stack; in source or whole paths;
    # 'imagesTr/{stem}_0000': of a folder those of such names
    data.masks = 'masks'  # of 'folder': its masks, or a file of annotations (VIA, COCO, labelme)
    data.attribute = ''  # of annotations: the one that names the class, where there are several
    data.mask_format = 'auto'  # 'index', 'binary', 'color'; 'auto': found out and said
    data.mask_colors = ()  # of the classes in turn, '#rrggbb', background first
    data.label_map = placeholder(object)  # of values that are no class numbers: {4: 3}, {'>0': 1}
    data.mask_name = '{stem}'  # its picture is STEM.png; '{stem}_mask'; several: '{stem}_mask*'
    data.group = ''  # the patient in a picture's name, "(.+)_"; or a .csv of stem,patient;
    # of slices of a volume "(.+)_(?P<slice>[0-9]+)", or a column slice: else each is by itself
    data.size = ()  # height, width that slices are resized to; (): their own, all the same
    data.context = 0  # slices before and after each that the network sees too, as channels (2.5D):
    # of the same scan, whose first and last are repeated
    data.normalize = placeholder(str)  # None: 'weights' with a file of them, else 'volume'; by
    # weights, images that are not of 8 bits have their measured range as 0 to 255; 'buda': volumes
    # as Buda's code does, one range for all channels, measured on the head
    data.split = 'holdout'  # or 'kfold', 'site': the patients of one fold or site are tested
    data.folds = 5  # of 'kfold'; python -m experiments.crossval runs them all
    data.fold = 0  # which one is tested
    data.site = ''  # which one is tested, of 'site'
    data.split_file = ''  # in place of these: a run's splits.json
    data.test_fraction = 0.15  # of patients, where the data has no public hold-out
    data.validation_fraction = 0.1  # of the other patients, site by site
    data.split_seed = 0  # of which patients are tested and validated
    # Of 'lgg', the ten patients that Buda's code held out: tested by 'holdout', and in no part of
    # the others; False: patients like all
    data.public_holdout = True
    data.sampling = 'lesion'  # 'lesion': by area of lesion (Buda 2019), or 'uniform'
    data.lesion_floor = 0.1  # share of draws that ignore the lesion (1/11 in Buda's code)
    data.threads = 4  # that decode ahead of the step
    data.bad_slices = 'stop'  # one that can't be read while training; 'skip': another, and a list
    data.cache = 'memory'  # decoded slices: 'none', 'memory' where they fit, 'device' (jit only)

    config.phantom = phantom = ConfigDict()
    phantom.volumes = 40  # synthetic heads
    phantom.slices = 12  # a volume
    phantom.size = 128  # pixels a side
    phantom.seed = 0  # of the heads

    config.augment = augment = ConfigDict()  # 'light' of configs/augmentations.py
    augment.crop = 0  # pixels a side; 0: the whole slice
    augment.flip = 0.5  # probability, left-right
    augment.flip_vertical = 0.0  # probability, upside-down
    augment.scale = 0.1  # zoom by 1/1.1 .. 1.1
    augment.rotate = 15.0  # +- degrees
    augment.elastic = 0.0  # standard deviation of the deformation, pixels
    augment.blur = 0.0  # largest standard deviation of a Gaussian, pixels (nnU-Net: 1)
    augment.blur_probability = 0.2  # nnU-Net's, as those of the two below
    augment.low_resolution = 0.0  # largest share of rows and columns that is lost (nnU-Net: 0.5)
    augment.low_resolution_probability = 0.25  # of each slice
    augment.gamma = 0.0  # 0.5: powers of 1/1.5 .. 1.5, each channel (nnU-Net: 0.7 .. 1.5)
    augment.gamma_probability = 0.3  # of each slice
    augment.gain = 0.1  # +- share, each channel
    augment.bias = 0.1  # +- standard deviations, each channel
    augment.noise = 0.0  # largest standard deviation

    config.loss = loss = ConfigDict()
    loss.cross_entropy = 1.0  # weight in the sum
    loss.dice = 1.0  # weight in the sum
    loss.focal = 0.0  # weight in the sum; as of those below, 0: not computed
    loss.focal_gamma = 2.0  # how little sure pixels count; Lin 2017 found 2 best
    loss.tversky = 0.0  # weight in the sum, in place of dice
    loss.tversky_alpha = 0.3  # cost of false positives
    loss.tversky_beta = 0.7  # of false negatives; both 0.5: dice. Salehi 2017 found these best
    loss.lovasz = 0.0  # weight in the sum; Berman 2018 fine-tunes with it
    loss.top_k = 0.0  # weight in the sum: cross-entropy of the hardest pixels
    loss.top_k_share = 0.1  # of the batch's pixels that are the hardest; nnU-Net's 10 %
    loss.boundary = 0.0  # weight in the sum, beside dice: Kervadec 2019 starts at 0.01
    loss.extra = placeholder(object)  # weights of own entries of losses.TERMS: {'mine': 0.5}
    loss.aux = 0.4  # weight of each auxiliary head's loss (paper, section 3.3)
    loss.class_weights = ()  # of cross_entropy, focal and top_k; (): all 1
    loss.ignore_label = 255  # of pixels that count in no loss and no figure

    config.optim = optim = ConfigDict()
    optim.name = 'adamw'  # adamw, adam, adamax, sgd, rmsprop, adagrad, adadelta (rate near 1)
    optim.learning_rate = 1e-4  # of the backbone
    optim.new_layer_factor = 10.0  # pyramid and heads learn faster (semseg)
    optim.schedule = 'poly'  # poly, cosine, constant
    optim.power = 0.9  # of poly
    optim.warmup = 0.1  # share of the run in which the rate rises; at most warmup_steps
    optim.warmup_steps = 50  # the most that optim.warmup may be
    optim.momentum = 0.9  # of sgd, and Adam's b1
    optim.beta2 = 0.999  # of the Adams
    optim.rho = 0.9  # of rmsprop and adadelta: their average of squares
    optim.weight_decay = 1e-4  # towards 0, decoupled in adamw
    optim.decay_exclude = ('bias', 'scale')  # parameter names that are not decayed
    optim.clip_norm = 1.0  # 0: no clipping

    config.distill = distill = ConfigDict()
    distill.teacher = ''  # a run's workdir, or WORKDIR@last, WORKDIR@STEP; '': none
    distill.loss = 'kl'  # 'kl', 'l1', 'l2': of the teacher's probabilities
    distill.weight = 1.0  # of that loss in the sum; loss.* at 0: the teacher alone
    distill.temperature = 1.0  # of 'kl'; 2 to 4 soften a teacher that is sure
    distill.pairwise = 0.0  # weight of the affinities between cells (Liu 2019 has 10)
    distill.nodes = 8  # cells a side between which these are, of the backbone's last map

    config.train = train = ConfigDict()
    train.init_from = ''  # weights of another run: WORKDIR (its best), WORKDIR@last, WORKDIR@STEP
    train.batch_size = 16  # over all devices
    train.accumulate = 1  # micro-batches a step
    train.remat = 'pointwise'  # computed again for the gradient: all but convolutions, or 'none'
    train.steps_per_call = 10  # updates in one program, with data.cache = 'device'
    train.epochs = 50.0  # passes over the training slices
    train.steps = 0  # if above 0, in place of epochs
    train.ema_decay = 0.0  # of the parameters' average that is evaluated, after a warm-up; 0: none
    train.log_every = 10  # steps
    train.validate_every = 0  # steps; 0: ten times a run
    train.checkpoint_every = 0  # steps; 0: at each validation
    train.nan_policy = 'stop'  # a loss or gradient that is no number; 'skip': no update then
    train.max_skipped = 10  # updates of a run; more of them stop it
    train.patience = 0  # validations without a better Dice before stopping; 0: never

    config.crf = crf = ConfigDict()  # fully connected, on evaluation and prediction
    crf.kernel = 'none'  # 'exact': all pairs, to 128 x 128 pixels; 'windowed': beyond
    crf.window = 16  # pixels each way, of the windowed one
    crf.iterations = 10  # of mean field
    crf.spatial_weight = 3.0  # of the kernel by place
    crf.spatial_sigma = 3.0  # pixels
    crf.bilateral_weight = 4.0  # of the kernel by place and colour
    crf.bilateral_sigma = 49.0  # pixels
    crf.color_sigma = 0.3  # of the normalised image

    config.predict = predict = ConfigDict()  # of evaluation and prediction, not validation
    predict.window = 0  # pixels a side of the tiles that the network sees; 0: whole images
    predict.overlap = 0.5  # of neighbouring tiles, share of the window
    predict.scales = (1.0,)  # at which images are seen, the mean is taken: (0.75, 1.0, 1.25)
    predict.flip = False  # mean with the left-right mirror image
    predict.threshold = placeholder(float)  # None: the likeliest class; of class 1, if 2 in all
    predict.largest_component = False  # of each class, nothing else is kept
    predict.min_size = 0  # pixels or voxels of a component, smaller ones go

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 16  # slices, or tiles with predict.window
    evaluation.spacing = (1.0, 1.0, 1.0)  # slice, row, column step; the unit of HD95
    evaluation.surface_tolerance = 1.0  # of surface Dice, in that unit
    evaluation.lesion_dilation = 3  # BraTS 2023: true lesions that meet after so many steps are one
    evaluation.lesion_smallest = 50.0  # of that unit, cubed; only larger lesions count (BraTS)
    evaluation.calibration_bins = 15  # of the probability of foreground, all of one width
    evaluation.bootstrap = 10_000  # resamples of the patients for the interval
    evaluation.checkpoint = 'best'  # 'best' by validation Dice, or 'last'
    return config.lock()


def comments() -> dict[str, str]:
    """{'model.width': what stands here about it}: behind a knob and in the lines after it, or
    before one that has nothing behind it.
    """
    told, section, last, waiting = {}, '', '', []
    for line in Path(__file__).read_text('utf-8').splitlines():
        if match := re.fullmatch(r'    config\.(\w+) = \w+ = ConfigDict\(\)(?:  # .*)?', line):
            section = f'{match[1]}.'
        elif match := re.fullmatch(r'    # (.*)', line):
            waiting.append(match[1])
        elif match := re.fullmatch(r'    (\w+)\.(\w+) = (?:.*?)(?:  # (.*))?', line):
            key = match[2] if match[1] == 'config' else section + match[2]
            told[key] = match[3] or ' '.join(waiting)
            if match[3] and waiting:
                told[last] = ' '.join([told[last], *waiting])
            last, waiting = key, []
    return told
