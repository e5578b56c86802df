"""The clips of a training run, put together as its settings say."""

from collections.abc import Generator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from stm_model.data.augment import DegradedClips
from stm_model.data.clips import Clip, FollowedClips, MixedClips
from stm_model.data.crowd import CollageClips, CrowdClips
from stm_model.data.davis import davis_videos
from stm_model.data.folders import TrainingData, is_davis, open_folder
from stm_model.data.images import ImageClips, LabelledImage
from stm_model.data.synthetic import ProceduralClips
from stm_model.data.video import Video, VideoClips
from stm_model.processes import signals_blocked
from stm_model.training.config import TrainConfig


def training_clips(config: TrainConfig) -> Dataset:
    """The dataset to train on; item i is a function of i.

    Raises:
        FileNotFoundError: a data folder, or something in it, is missing.
        ValueError: frames and masks of a folder don't match.
    """
    size = (config.crop, config.crop_width or config.crop)
    procedural = ProceduralClips(config.frames, size)
    if not config.data:
        return FollowedClips(_crowded(procedural, [], config))
    folders = [open_folder(path, config.split) for path in config.data]
    mixes = [_clips_of(folder, config) for folder in folders]
    weights = config.weights or (1.0,) * len(mixes)
    clips = MixedClips([clips for clips, _ in mixes], weights)
    cut_outs = MixedClips([cut_outs for _, cut_outs in mixes], weights)
    collage = CollageClips(clips, cut_outs, config.paste, config.distract, config.replace)
    mixed = MixedClips([collage, procedural], [1 - config.procedural, config.procedural])
    images = [image for folder in folders for image in folder.images]
    return FollowedClips(_crowded(mixed, images, config))


def _crowded(clips: Dataset, images: list[LabelledImage], config: TrainConfig) -> Dataset:
    if config.crowd:
        clips = CrowdClips(clips, images, config.crowd, config.most_objects, config.color)
    return DegradedClips(clips, config.degrade) if config.degrade else clips


def _clips_of(data: TrainingData, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """The clips of one folder, and clips to cut objects out of."""
    size = (config.crop, config.crop_width or config.crop)
    options: dict[str, Any] = {"frames": config.frames, "size": size, "color": config.color}
    regions = ImageClips(data.images, regions=True, **options)
    options["most_objects"] = config.most_objects
    stills = ImageClips(data.images, follow=config.follow, **options)
    if not data.videos:
        return stills, MixedClips([stills, regions], [1 - config.regions, config.regions])
    growth = round(config.skip_growth * config.steps * config.batch)
    videos = VideoClips(data.videos, max_skip=config.max_skip, growth=growth, motion=config.motion, **options)
    # a cut-out's own motion matters more than that of its video: most come from stills
    objects = MixedClips([videos, stills], [0.4, 0.6])
    return (
        MixedClips([videos, stills], [1 - config.stills, config.stills]),
        MixedClips([objects, regions], [1 - config.regions, config.regions]),
    )


def validation_sequences(config: TrainConfig) -> list[Video]:
    """The videos to score the weights on; none without data or a list.

    Raises:
        FileNotFoundError: no folder has the list, or a sequence of it is missing.
    """
    folders = [path for path in config.data if is_davis(path)]
    if config.validation_split is None or not folders:
        return []
    return davis_videos(folders[0], config.validation_split)


def batches(
    config: TrainConfig, dataset: Dataset, start: int, rank: int = 0, processes: int = 1
) -> Generator[list[Clip], None, None]:
    """The clips of steps start + 1 … steps, in `accumulate` parts a step.

    Each step's clips are a function of the step and the seed alone; the processes share them out.
    """
    # seeds count the clips of a run from a multiple of 2^32, as VideoClips expects
    first = config.seed << 32
    share = config.batch // processes
    part = share // config.accumulate
    seeds = []
    for step in range(start, config.steps):
        numbers = [step * config.batch + rank * share + item for item in range(share)]
        if config.distinct:
            numbers = [number % config.distinct for number in numbers]
        seeds += [[first + number for number in numbers[at : at + part]] for at in range(0, share, part)]
    if not seeds:
        return
    # an error in a worker comes with a traceback as its message: an unusable dataset should say so plainly
    dataset[seeds[0][0]]
    loader = DataLoader(
        dataset,
        batch_sampler=seeds,
        collate_fn=list,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    with signals_blocked():
        loaded: Any = iter(loader)
    try:
        yield from loaded
    finally:
        if config.workers:
            # Python would end them by SIGTERM, which they don't get, and wait
            loaded._shutdown_workers()
            for worker in loaded._workers:
                worker.kill()
