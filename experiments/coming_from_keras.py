"""What image-segmentation-keras has, what it is here, and the test that shows it.

The table of docs/coming-from-keras.md; `python -m experiments.tables` writes it, and
tests/test_readme.py holds that the tests named are there.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """Theirs, ours, the command or call, and the tests, FILE::NAME in tests/."""

    theirs: str
    ours: str
    call: str
    tests: tuple[str, ...]


ROWS = {
    'F01': Row(
        '22 models by name',
        'the same names, and dilated, DeepLab v1, v2, v3, v3+, RefineNet; any backbone under any '
        'decoder (models.md has what each stands for)',
        '--config=configs/folder.py:vgg_unet',
        ('test_models::test_the_keras_tools_names_are_known',
         'test_models::test_every_kind_of_backbone_under_every_decoder'),
    ),
    'F02': Row(
        'n_classes, input_height, input_width, channels; sizes that divide by 32 or 192',
        'model.num_classes; any height, width and number of channels; data.size for mixed sizes',
        '--config.model.num_classes=3 --config.data.size="(256, 320)"',
        ('test_models::test_logits_have_the_images_size_in_bfloat16_too',
         'test_folder::test_mixed_sizes_get_one_near_their_median'),
    ),
    'F03': Row(
        'train(images, annotations)',
        'the same, split by patient',
        "pspnet_jax.train('vgg_pspnet', images=..., masks=...)",
        ('test_api::test_a_picture_gets_the_mask_that_the_command_writes',
         'test_folder::test_patients_by_expression_and_by_table'),
    ),
    'F04': Row(
        'verify_dataset, stops at the first fault',
        'every fault at once with its remedy; leaks between the parts; a contact sheet',
        'python -m pspnet_jax.check',
        ('test_folder::test_every_fault_is_listed_at_once',
         'test_folder::test_check_finds_the_same_picture_in_two_parts'),
    ),
    'F05': Row(
        'weights of each epoch and config.json',
        'parameters, statistics, optimiser, average, config and digests; the last and the best',
        'RUN/checkpoints/',
        ('test_checkpoint::test_the_whole_state_comes_back',
         'test_checkpoint::test_best_and_last_are_kept'),
    ),
    'F06': Row(
        'auto_resume_checkpoint: weights and epoch',
        'the same command again goes on, to the same bits',
        '--workdir=RUN',
        ('test_train::test_resume_equals_uninterrupted_bit_for_bit',),
    ),
    'F07': Row(
        'load_weights',
        'train.init_from: what matched, what is only there, what is only here',
        '--config.train.init_from=RUN@best',
        ('test_transfer::test_both_sides_are_listed_and_a_module_is_whole_or_new',),
    ),
    'F08': Row(
        'epochs, batch_size, steps_per_epoch=512',
        'an epoch is one pass over the data; train.steps where steps are meant',
        '--config.train.epochs=20',
        ('test_train::test_the_log_has_each_step_once',),
    ),
    'F09': Row(
        'validate, val_images, val_annotations',
        'whole validation volumes, of patients that are not trained on; splits.json keeps which',
        '--config.data.validation_fraction=0.2',
        ('test_splits::test_parts_are_disjoint_and_together_everybody',
         'test_splits::test_a_split_of_other_data_is_refused'),
    ),
    'F10': Row(
        'optimizer_name',
        'sgd, adam, adamw, adamax, rmsprop, adagrad, adadelta; poly schedule, new layers faster',
        '--config.optim.name=rmsprop',
        ('test_optim::test_optimiser_follows_pytorchs',),
    ),
    'F11': Row(
        'ignore_zero_class',
        'loss.ignore_label: such pixels count in no loss and no figure',
        '--config.loss.ignore_label=0',
        ('test_losses::test_ignored_pixels_have_no_gradient',),
    ),
    'F12, F13': Row(
        'do_augment with four named sets; custom_augmentation',
        'recipes by name, knobs, and a function of your own inside the compiled step',
        '--config=configs/folder.py:unet,strong',
        ('test_config::test_a_recipe_can_be_changed_knob_by_knob',
         'test_transfer::test_a_function_of_ones_own_comes_behind_the_crop_with_a_key_an_example'),
    ),
    'F14': Row(
        'callbacks, which replace checkpointing',
        'on_log and on_validation add and take nothing away',
        'train_and_evaluate(config, workdir, on_log=...)',
        ('test_transfer::test_hooks_hear_everything_and_take_nothing_away',),
    ),
    'F15': Row(
        'preprocessing, not applied at prediction',
        'the normalisation is in the checkpoint and applied everywhere',
        '--config.data.normalize=weights',
        ('test_pretrained::test_pretrained_weights_bring_their_normalisation',),
    ),
    'F16': Row(
        'other_inputs_paths',
        'several folders stack as channels',
        '--config.data.images="(\'flair\', \'t1\')"',
        ('test_folder::test_folders_stack_as_channels',),
    ),
    'F17': Row(
        'read_image_type',
        'found out: 8 and 16 bit, grey, palette, RGB, RGBA, TIFF, WebP, NIfTI, DICOM, arrays',
        'pspnet_jax.data.formats.read(PATH)',
        ('test_flat::test_a_picture_gives_its_pixels_and_its_labels',),
    ),
    'F20, F21': Row(
        'predict, predict_multiple: at model size, one at a time',
        "full resolution, batched, resumed; probabilities too",
        'python -m pspnet_jax.predict --workdir=RUN --input=FOLDER --output=MASKS',
        ('test_predict::test_a_folder_becomes_masks_overlays_and_panels',
         'test_predict::test_what_is_finished_is_skipped_and_what_is_not_is_done'),
    ),
    'F22': Row(
        'predict_video: file, webcam, frames a second',
        'the same, frames batched, reading and writing beside the network',
        'python -m pspnet_jax.predict --workdir=RUN --input=film.mp4 --output=OUT',
        ('test_video::test_a_video_becomes_videos_frame_by_frame',),
    ),
    'F23': Row(
        'evaluate_segmentation: frequency_weighted_IU, mean_IU, class_wise_IU at a quarter of the '
        'size',
        'the same keys at full size; Dice, HD95, ASSD of whole volumes, by patient, with '
        'intervals and the baseline; report.html',
        "python -m pspnet_jax.evaluate --workdir=RUN; model.evaluate(images, masks)",
        ('test_metrics::test_pooled_iou_is_what_the_keras_tool_computes',
         'test_evaluate::test_evaluation_json_has_what_is_promised'),
    ),
    'F24, F25': Row(
        'overlay_img, class_names, show_legends, colors; prediction_width and _height',
        'overlay with its legend, outline, three panels; always at the own size of the picture',
        '--save=overlay,outline,panels --config.model.class_names',
        ('test_predict::test_the_legend_names_the_classes_that_are_there',
         'test_predict::test_pictures_show_the_mask_and_keep_the_rest'),
    ),
    'F26': Row(
        'model_from_checkpoint_path',
        'the folder of the run alone; an error lists what is there',
        "pspnet_jax.load('RUN')",
        ('test_api::test_a_run_is_loaded_with_other_options_of_prediction',
         'test_checkpoint::test_an_unknown_step_lists_those_there'),
    ),
    'F27, F28': Row(
        'transfer_weights; distillation by l1, l2, kl, pairwise affinity',
        'the same, inside the compiled step, resumed to the same bits',
        '--config.distill.teacher=RUN --config.distill.loss=kl --config.distill.pairwise=1.0',
        ('test_losses::test_distillation_by_kl_and_its_gradient_equal_pytorchs',
         'test_losses::test_pairwise_affinity_pair_by_pair',
         'test_transfer::test_teacher_and_affinities_resume_to_the_bit'),
    ),
    'F29': Row(
        'pretrained on ADE20K, Cityscapes, VOC',
        'converters for files of Keras, torchvision, semseg, timm, segmentation_models_pytorch',
        'python -m pspnet_jax.convert --source=FILE --out=RUN',
        ('test_parity::test_pspnet_equals_semsegs',
         'test_parity::test_networks_equal_torchvisions'),
    ),
    'F30': Row(
        'visualize_segmentation_dataset, in a window',
        'a contact sheet as a file, augmented pictures below each',
        'python -m pspnet_jax.check --out=CHECK',
        ('test_folder::test_check_finds_the_same_picture_in_two_parts',),
    ),
    'F31, F32': Row(
        'pairs by stem; jpg, png, bmp; label = value, so that a 0/255 mask fails',
        '0/255, palettes and colours become classes, said in one line, refused where in doubt',
        '--config.data.mask_colors="(\'#000000\', \'#ff0000\')"',
        ('test_folder::test_every_kind_of_mask_becomes_the_same_classes',
         'test_folder::test_what_could_mean_two_things_is_refused_with_the_choices',
         'test_whole::test_the_same_masks_of_another_kind_give_the_same_run'),
    ),
    'F34': Row(
        'train, predict, predict_video, verify_dataset, visualize_dataset, evaluate_model',
        'main, predict (videos too), check (verifies and draws), evaluate',
        'python -m pspnet_jax.evaluate --workdir=RUN',
        ('test_cli::test_build_then_evaluate_then_predict',
         'test_whole::test_pictures_go_through_every_command'),
    ),
}  # fmt: skip


def table() -> str:
    """The rows as Markdown."""
    lines = ['| | theirs | ours | command or call | shown by |', '|---|---|---|---|---|']
    for name, row in ROWS.items():
        tests = ', '.join(f'`{test}`' for test in row.tests)
        lines.append(f'| {name} | {row.theirs} | {row.ours} | `{row.call}` | {tests} |')
    return '\n'.join(lines)
