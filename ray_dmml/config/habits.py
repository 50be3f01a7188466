"""Names that other tools have for our settings, and what to write instead."""

from __future__ import annotations

_SETTINGS = {
    "train.steps": "max_steps num_steps n_steps total_steps iterations iters max_iters num_iterations",
    "train.evaluate_every": "eval_every eval_steps val_every eval_interval val_check_interval",
    "train.init_from": "finetune_from load_from init_checkpoint",
    "checkpoint.every_steps": "save_every save_steps save_interval",
    "checkpoint.num_to_keep": "save_total_limit keep_last max_to_keep",
    "data.name": "dataset dataset_name data_name",
    "data.root": "path paths dir folder data_dir data_path data_root image_dir images_dir image_folder dataset_path "
    "dataset_dir root_dir train_dir",
    "data.manifest": "csv csv_file csv_path annotations dataframe",
    "data.validation_fraction": "val_fraction val_split val_size valid_fraction validation_split validation_size",
    "data.train_fraction": "train_split train_size train_ratio",
    "data.classes_per_batch": "num_classes_per_batch n_classes labels_per_batch n_labels",
    "data.images_per_class": "samples_per_class num_instances n_instances images_per_label samples_per_label",
    "loss.metric.name": "criterion loss_fn loss_name metric_loss",
    "evaluation.recall_at": "recall_k recall_ks topk top_k ks",
    "seed": "random_seed random_state manual_seed",
}
_SETTINGS_OF_A_PEER = {
    "backbone": "model model_name arch architecture network net encoder extractor",
    "weights": "weights pretrained_weights checkpoint_path",
    "embedding_size": "embedding_dim embed_dim emb_dim emb_size feature_dim feat_dim dim out_dim output_dim",
    "input_size": "image_size img_size imgsz im_size crop_size resolution",
    "view": "augmentation augmentations augment transform transforms",
    "optimizer.lr": "lr learning_rate base_lr init_lr lr_backbone",
    "optimizer.head_lr": "lr_head",
    "optimizer.clip_norm": "grad_clip gradient_clip gradient_clip_val max_grad_norm clip_grad clip_grad_norm",
    "optimizer": "optim",
    "schedule": "scheduler lr_scheduler lr_schedule",
    "schedule.warmup_steps": "warmup num_warmup_steps",
    "update_interval": "accumulate_grad_batches gradient_accumulation_steps grad_accum accumulation_steps",
    "amp": "precision mixed_precision fp16 bf16 use_amp",
    "num_gpus": "gpu gpus n_gpus",
    "num_cpus": "workers num_workers n_workers cpus",
    "frozen": "freeze",
}
_SENTENCES = {
    "epochs epoch num_epochs n_epochs max_epochs": "the length is 'train.steps', in batches; "
    "a run reports at its start how many steps an epoch has",
    "batch_size bs train_batch_size batchsize per_device_train_batch_size": "a batch is 'data.classes_per_batch' "
    "classes x 'data.images_per_class' images",
    "data": "the folder of your images is 'data.root'; with a folder for each class, 'data.name' is imagefolder",
    "pretrained": "write `weights: pretrained` for each peer, or once in 'cohort.base'",
    "device devices cuda accelerator": "a peer uses a GPU if there is one; 'cohort.base.num_gpus' says how many, and 0 "
    "is the CPU",
    "num_peers n_peers num_models num_networks": "'cohort.peers' is a list with an entry for each peer, "
    "such as [{}, {}, {}]",
    "out output output_dir out_dir save_dir run_dir log_dir logdir workdir work_dir": "the folder of a run is not a "
    "setting: it is `train --out`, or `out` of train()",
    "resume resume_from resume_from_checkpoint": "it is not a setting: it is `train --resume`, or `resume` of train()",
    "local": "it is not a setting: it is `train --local`, or `local=True` of train()",
    "margin": "arguments of the metric loss are in 'loss.metric.args', such as 'loss.metric.args.margin'",
}


def _flat(table: dict[str, str]) -> dict[str, str]:
    return {name: setting for setting, names in table.items() for name in names.split()}


OF_A_RUN, OF_A_PEER = _flat(_SETTINGS), _flat(_SETTINGS_OF_A_PEER)
SENTENCES = {name: sentence for names, sentence in _SENTENCES.items() for name in names.split()}


def setting_of(name: str) -> str | None:
    """The dotted setting that a name from another tool means, a peer's as `cohort.peers.backbone`."""
    name = name.lower().replace("-", "_")
    return f"cohort.peers.{OF_A_PEER[name]}" if name in OF_A_PEER else OF_A_RUN.get(name)


def sentence_of(name: str) -> str | None:
    """What to write instead of a name from another tool that means no single setting."""
    return SENTENCES.get(name.lower().replace("-", "_"))
