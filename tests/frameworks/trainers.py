"""Each trainer as its users write it: train a case to an epoch, save by the trainer's own means, and go on from there.

A function here takes (case, folder, until, resume) and returns the network and its optimizer. It trains from the start,
or with ``resume`` from what an earlier call saved in the folder, to the end of epoch ``until``, and saves.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import normopt
from tests.frameworks.cases import BATCH, EPOCHS, PER_EPOCH, STEPS, Case, Net, data, loader

Found = tuple[torch.nn.Module, torch.optim.Optimizer]


def plain_loop(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """nanoGPT's: the checkpoint has the model and the optimizer, and no scheduler."""
    net = Net()
    opt = case.make(net)
    first = 0
    if resume:
        saved = torch.load(folder / "ckpt.pt", weights_only=True)
        net.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    of_p = [normopt.schedules.CosineP(opt, STEPS)] if case.has_p else []
    for epoch in range(first, until):
        for step, (x, y) in enumerate(loader()):
            for group in opt.param_groups:  # the learning rate is a function of the step, as there
                group["lr"] = opt.defaults["lr"] * (1 - (epoch * PER_EPOCH + step) / STEPS)
            cross_entropy(net(x), y).backward()
            opt.step()
            for sched in of_p:
                sched.step()
            opt.zero_grad()
    torch.save({"model": net.state_dict(), "optimizer": opt.state_dict(), "epoch": until}, folder / "ckpt.pt")
    return net, opt


def _lightning(case: Case, folder: Path, until: int, resume: bool, manual: bool) -> Found:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = not manual

        def configure_optimizers(self) -> Any:
            opt = case.make(self.net)
            return [opt], [{"scheduler": each, "interval": "step"} for each in case.schedules(opt)]

        def training_step(self, batch: Any) -> Any:
            x, y = batch
            loss = cross_entropy(self.net(x), y)
            if not manual:
                return loss
            opt, schedulers = self.optimizers(), self.lr_schedulers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            for each in schedulers if isinstance(schedulers, list) else [schedulers]:
                each.step()
            return None

    trainer = lightning_trainer(folder, until)
    module = Module()
    trainer.fit(module, loader(), ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.net, trainer.optimizers[0]


def lightning_settings(folder: Path, until: int) -> dict[str, Any]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return quiet | {
        "max_epochs": until,
        "default_root_dir": str(folder),
        "logger": False,
        "accelerator": "cpu",
        "devices": 1,
    }


def lightning_trainer(folder: Path, until: int) -> Any:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning.Trainer(**lightning_settings(folder, until))


def lightning_automatic(case: Case, folder: Path, until: int, resume: bool) -> Found:
    return _lightning(case, folder, until, resume, manual=False)


def lightning_manual(case: Case, folder: Path, until: int, resume: bool) -> Found:
    return _lightning(case, folder, until, resume, manual=True)


def lightning_cli(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """The optimizer by name and arguments: `fit --optimizer normopt.LPSGDM --optimizer.p_steps 24`."""
    import lightning
    from lightning.pytorch.cli import LightningCLI

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any) -> Any:
            return cross_entropy(self.net(batch[0]), batch[1])

        def train_dataloader(self) -> Any:
            return loader()

    named = dict(case.named or {})
    cls = named.pop("cls")
    arguments = [f"--optimizer={cls.__module__}.{cls.__qualname__}"]
    arguments += [f"--optimizer.{key}={value}" for key, value in named.items()]
    arguments += ["--lr_scheduler=CosineAnnealingLR", f"--lr_scheduler.T_max={EPOCHS}"]
    arguments += [
        f"--trainer.{key}={str(v).lower() if v is False else v}" for key, v in lightning_settings(folder, until).items()
    ]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cli = LightningCLI(
        Module,
        args=["fit", *arguments, *([f"--ckpt_path={folder / 'last.ckpt'}", "--weights_only=true"] if resume else [])],
        save_config_callback=None,
        seed_everything_default=False,
    )
    cli.trainer.save_checkpoint(folder / "last.ckpt")
    return cli.model.net, cli.trainer.optimizers[0]


def accelerate(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """With gradients accumulated over two micro-batches; Accelerate steps the schedulers with the optimizer."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    opt = case.make(net)
    prepared = accelerator.prepare(net, opt, loader(), *case.schedules(opt, STEPS // 2))
    model, wrapped, batches, *schedulers = prepared
    if resume:
        accelerator.load_state(str(folder / "state"))
    for _ in range(until - (EPOCHS // 2 if resume else 0)):
        for x, y in batches:
            with accelerator.accumulate(model):
                wrapped.zero_grad()
                accelerator.backward(cross_entropy(model(x), y))
                wrapped.step()
                for each in schedulers:
                    each.step()
    accelerator.save_state(str(folder / "state"))
    return net, opt


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(data())

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x, y = data()[i]
        return {"x": x, "labels": y}


class _WithLoss(torch.nn.Module):
    """What the Trainer takes for a model: a module that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def _transformers(folder: Path, until: int, resume: bool, model: _WithLoss, **given: Any) -> Found:
    import transformers

    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.02,
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=PER_EPOCH * until,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == PER_EPOCH * until:
                control.should_save = control.should_training_stop = True
            return control

    trainer = transformers.Trainer(model, settings, train_dataset=_Rows(), callbacks=[Stop()], **given)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resume else None)
    opt = trainer.optimizer
    return model.net, getattr(opt, "optimizer", opt)


def transformers_optimizers(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """`Trainer(optimizers=(optimizer, scheduler))`."""
    model = _WithLoss()
    opt = case.make(model.net)
    return _transformers(folder, until, resume, model, optimizers=(opt, case.schedule(opt)))


def transformers_cls_and_kwargs(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """`Trainer(optimizer_cls_and_kwargs=(cls, arguments))`: the Trainer makes its own two groups and scheduler."""
    named = dict(case.named or {})
    return _transformers(folder, until, resume, _WithLoss(), optimizer_cls_and_kwargs=(named.pop("cls"), named))


def ignite(case: Case, folder: Path, until: int, resume: bool) -> Found:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver

    net = Net()
    opt = case.make(net)
    schedule = case.schedule(opt)
    trainer = create_supervised_trainer(net, opt, cross_entropy)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    kept = {"net": net, "opt": opt, "schedule": schedule, "trainer": trainer}
    if resume:
        Checkpoint.load_objects(kept, torch.load(next(folder.glob("*.pt")), weights_only=True))
    save = Checkpoint(kept, DiskSaver(str(folder), require_empty=False), n_saved=1)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=until), save)
    trainer.run(loader(), max_epochs=until)
    return net, opt


def skorch(case: Case, folder: Path, until: int, resume: bool) -> Found:
    import skorch.callbacks

    class Classifier(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *_: Any) -> Any:  # groups are made from the module
            self.optimizer_ = case.make(self.module_)
            return self

    of_lr = skorch.callbacks.LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS, step_every="epoch")
    # last_epoch=None: go on from the steps that the optimizer's groups keep; skorch would count epochs.
    of_p = skorch.callbacks.LRScheduler(
        normopt.schedules.CosineP, total_steps=STEPS, step_every="batch", last_epoch=None
    )
    schedulers = {"of_lr": of_lr} | ({"of_p": of_p} if case.has_p else {})
    net = Classifier(
        Net,
        criterion=torch.nn.CrossEntropyLoss,
        batch_size=BATCH,
        train_split=None,
        iterator_train__shuffle=False,
        callbacks=list(schedulers.items()),
        callbacks__print_log=None,
        max_epochs=until,
        verbose=0,
    )
    x, y = data().tensors
    net.initialize()
    files = {f"f_{name}": folder / f"{name}.pt" for name in ("params", "optimizer", "history")}
    if resume:
        net.load_params(**files)
    net.partial_fit(x, y, epochs=until - len(net.history))
    net.save_params(**files)
    return net.module_, net.optimizer_


def timm(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """The calls of timm's train.py, which makes the optimizer by name and has no second scheduler."""
    import timm.optim
    import timm.scheduler
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver

    net = Net()
    if case.named and case.named["cls"] in (known := normopt.integrations.timm.register()).values():
        named = dict(case.named)
        cls = named.pop("cls")
        name = next(name for name, each in known.items() if each is cls)
        opt = timm.optim.create_optimizer_v2(net, opt=name, weight_decay=0.0, **named)
    else:
        opt = case.make(net)
    scheduler, _ = timm.scheduler.create_scheduler_v2(opt, "cosine", num_epochs=EPOCHS)
    saver = CheckpointSaver(net, opt, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=1)
    first = 0
    if resume:
        first = resume_checkpoint(net, str(folder / "last.pth.tar"), optimizer=opt, log_info=False)
        scheduler.step(first)
    for epoch in range(first, until):
        for x, y in loader():
            opt.zero_grad()
            cross_entropy(net(x), y).backward()
            opt.step()
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    return net, opt


def fastai(case: Case, folder: Path, until: int, resume: bool) -> Found:
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class StepAll(Callback):
        def __init__(self, schedulers: list[Any]) -> None:
            self.schedulers = schedulers

        def after_step(self) -> None:
            for each in self.schedulers:
                each.step()

    net = Net()
    opt = case.make(net)
    train = DataLoader(data(), bs=BATCH, shuffle=False)
    learner = Learner(
        DataLoaders(train, train, device=torch.device("cpu")),
        net,
        loss_func=cross_entropy,
        opt_func=lambda *_, **__: OptimWrapper(opt=opt),
        path=folder,
        cbs=StepAll(case.schedules(opt)[1:]),
    )
    learner.create_opt()
    if resume:
        learner.load("half", with_opt=True)
    with learner.removed_cbs(ProgressCallback), learner.no_logging():
        learner.fit(until - (EPOCHS // 2 if resume else 0), lr=opt.defaults["lr"])
    learner.save("half", with_opt=True)
    return net, opt


def torchtitan(case: Case, folder: Path, until: int, resume: bool) -> Found:
    """Its optimizers by name, one entry of the registry added; its flat checkpoint, keyed by parameters' names."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    assert case.named is not None
    once = {key: value for key, value in case.named.items() if key not in ("cls", "lr")}
    factory, lr = case.named["cls"], {"lr": case.named["lr"]}

    class Container(OptimizersContainer[Any]):  # type: ignore[misc]
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            return {"ours": factory}[name]

    net = Net()
    group = ParamGroupConfig(pattern=".*", optimizer_name="ours", optimizer_kwargs=lr)
    config = OptimizersContainer.Config(
        param_groups=[group], implementation="for-loop", optimizer_factory_kwargs_by_name={"ours": once}
    )
    container = Container(config, model_parts=[net])
    scheduler = CosineAnnealingLR(container.optimizers[0], STEPS)
    first = 0
    if resume:
        saved = torch.load(folder / "step.pt", weights_only=True)
        net.load_state_dict(saved["model"])
        container.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["lr_scheduler"])
        first = saved["epoch"]
    for _ in range(first, until):
        for x, y in loader():
            container.zero_grad()
            cross_entropy(net(x), y).backward()
            container.step()
            scheduler.step()
    states = {"model": net.state_dict(), "optimizer": container.state_dict(), "lr_scheduler": scheduler.state_dict()}
    torch.save(states | {"epoch": until}, folder / "step.pt")
    return net, container.optimizers[0]


# The packages that each needs, of which the first is named in the table.
TRAINERS = {
    "a plain loop, as nanoGPT's": (("torch",), plain_loop),
    "Lightning, automatic": (("lightning",), lightning_automatic),
    "Lightning, manual": (("lightning",), lightning_manual),
    "LightningCLI": (("lightning", "jsonargparse"), lightning_cli),
    "Accelerate": (("accelerate",), accelerate),
    "HF Trainer, `optimizers`": (("transformers",), transformers_optimizers),
    "HF Trainer, `optimizer_cls_and_kwargs`": (("transformers",), transformers_cls_and_kwargs),
    "ignite": (("pytorch-ignite",), ignite),
    "skorch": (("skorch",), skorch),
    "timm, the calls of train.py": (("timm",), timm),
    "fastai": (("fastai",), fastai),
    "torchtitan's optimizers": (("torchtitan",), torchtitan),
}
BY_NAME = (lightning_cli, transformers_cls_and_kwargs, torchtitan)
