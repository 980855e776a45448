"""Batches of neighbourhoods: P clusters with K images each, one caption per image."""

from __future__ import annotations

import functools
import numbers
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler

from hrem_layers._core.checks import check_bool, check_int
from hrem_layers.sampler.arguments import check_counts, check_labels, check_source, check_state
from hrem_layers.sampler.arrays import Ints
from hrem_layers.sampler.clustering import check_num_clusters, check_seed, cluster_features
from hrem_layers.sampler.epoch import Epoch, EpochBatches, State, step_count
from hrem_layers.sampler.features import Features
from hrem_layers.sampler.iteration import EpochSetter, Iteration, Position
from hrem_layers.sampler.layout import Layout
from hrem_layers.sampler.processes import (
    check_ranks,
    made_by_rank_0,
    ranks_of_the_group,
    refuse_to_be_shared_out_twice,
)

_Init = TypeVar("_Init", bound=Callable[..., None])
_IMAGES_PER_CLUSTER = 4  # times images_per_cluster: the average size of a cluster by default


def _not_rebuilt_by_a_framework(init: _Init) -> _Init:
    """Say what is wrong when a framework takes this for torch's ``BatchSampler(sampler, batch_size, drop_last)``."""

    @functools.wraps(init)
    def checked(self: object, *args: Any, **kwargs: Any) -> None:
        if len(args) > 1 or {"sampler", "batch_size"} & kwargs.keys() or (args and isinstance(args[0], Sampler)):
            raise TypeError(
                "NeighborBatchSampler takes image_features and keyword arguments; it was called like torch's "
                "BatchSampler(sampler, batch_size, drop_last), as frameworks do to put a distributed sampler into it. "
                "It shares its batches out among the ranks by itself: in Lightning set "
                "Trainer(use_distributed_sampler=False), in Fabric setup_dataloaders(..., "
                "use_distributed_sampler=False). Lightning's Trainer.predict rebuilds every sampler: give it a "
                "DataLoader without this one, which is for training"
            )
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


class NeighborBatchSampler(Sampler[list[int]]):
    """Batches of ``clusters_per_batch`` clusters with ``images_per_cluster`` images each, one caption per image.

    For ``DataLoader(dataset, batch_sampler=...)``. Yields lists of caption indices: caption j of image i is
    ``i * captions_per_image + j``, or ``captions_per_image[0] + ... + captions_per_image[i - 1] + j`` if the images
    differ in their number of captions. Images are clustered once, by k-means on ``image_features``
    (:func:`hrem_layers.sampler.clustering.cluster_features`), or elsewhere and given as ``cluster_ids``.

    **An epoch.** Below, B = ``num_replicas * clusters_per_batch * images_per_cluster`` is the batch of all ranks
    together, a step.

    - Every caption comes at most once; with ``drop_last=False`` exactly once. With ``drop_last=True`` only the
      captions beyond the last full step are left out, fewer than B, others in every epoch.
    - No step (hence no batch) holds two captions of one image where sizes and numbers of captions allow that; an image
      with no more captions than the epoch has full steps is never doubled.
    - A step takes groups of ``images_per_cluster`` images of one cluster, from different clusters: one that has no more
      groups in the epoch than there are full steps comes once in a step at most, a larger one in every step, as often
      in one as in another as can be. In a cluster an image comes again only after the others.
    - What fits no group stays together in pieces as large as possible, and pieces of several clusters share the places
      left free: clusters of fewer images than ``images_per_cluster`` are such pieces, a larger one leaves fewer
      captions than a group. (It may leave more if its images differ in their numbers of captions, or if the epoch has
      fewer than twice as many steps as an image has captions; and what the rule on images that come twice displaces
      breaks up a group here and there.)
    - The batches of the ranks are consecutive parts of the step, so that ``num_replicas`` of ``clusters_per_batch``
      make the same steps, in the same order, as one process with ``num_replicas * clusters_per_batch`` (unless, with
      ``drop_last=False``, fewer captions are left over than there are ranks).

    **Equal on all ranks.** ``len`` is exact and the same on every rank, whatever the sizes. With ``drop_last=False``
    the last batch of an epoch is shorter, and the ranks' last batches differ by one caption at most. If fewer captions
    are left over than there are ranks, each rank's last batch holds one caption, and those that lacked one give it
    from the batch before; batches of one caption, which cannot, get a second one instead.

    **The order** is a function of (``seed``, epoch) only, given the clusters and options: the same on every rank,
    platform and version of numpy. The epoch is set by :meth:`set_epoch`, also on the attribute ``sampler``, which is
    where Lightning and accelerate look; without it the same epoch comes again. With ``shuffle=False`` neither counts:
    clusters by label, images by index and captions by number, as far as the rules above leave them in place.

    **Resuming.** :meth:`state_dict` and :meth:`load_state_dict` say where in an epoch the sampler is. torchdata's
    ``StatefulDataLoader`` calls them by itself, with any number of workers. A plain DataLoader with workers fetches
    ahead; then tell the number of batches trained on: ``state_dict(batches_done=...)``.

    **Frameworks.** Lightning: ``Trainer(use_distributed_sampler=False)``; with True, its default, there is an error
    that says so on several devices. ``Trainer.predict`` rebuilds every batch sampler, whatever that option says, and
    gets the same error: predict with a plain DataLoader. ``overfit_batches`` takes the first batches of every epoch,
    which are others each time unless ``shuffle=False``. accelerate: ``prepare`` shares batches out by itself, so give
    ``num_replicas=1``. So that nothing is shared out twice, None is refused in a group with an ``Accelerator``, and
    iterating a prepared DataLoader with more than one replica is; its ``even_batches=True``, the default, repeats
    captions of the epoch's beginning if ``drop_last=False``, so use ``drop_last=True`` or ``even_batches=False``; only
    with ``split_batches=True`` are images distinct over the ranks, too.

    Args:
        image_features: (images, dimensions), floating point: numpy array, ``np.memmap`` or CPU tensor. Not kept, and
            never copied whole. Either these or ``cluster_ids``.
        cluster_ids: (images,), integers of at least 0, with gaps if need be: list, numpy array or tensor.
        num_clusters: for k-means, 1 .. images. None: one per ``4 * images_per_cluster`` images.
        clusters_per_batch: P, at least 1.
        images_per_cluster: K, at least 1.
        captions_per_image: at least 1; or a count per image, which may be 0 (such an image never comes).
        drop_last: leave out the captions that do not fill a step.
        shuffle: False: the same order in every epoch.
        seed: at least 0, below 2^128; also of k-means.
        num_replicas: processes that share the epoch out. None: from ``torch.distributed``, at the latest when first
            asked, 1 if it is not initialised. If it is when the sampler is made, rank 0 clusters and sends the labels
            to the others, so all ranks must make it (and call ``refresh``) together; with ``num_replicas`` given,
            nothing is sent, and every process needs the same features or labels.
        rank: of this process, below ``num_replicas``. None: from ``torch.distributed``.

    Raises:
        TypeError, ValueError: for any other argument, and if ``drop_last=False`` and there are fewer captions than
            ranks.

    Warns:
        UserWarning: if ``drop_last=True`` and the captions do not fill one step, so that ``len`` is 0.

    Example:
        >>> from hrem_layers import NeighborBatchSampler
        >>> sampler = NeighborBatchSampler(
        ...     cluster_ids=[0, 0, 0, 1, 1, 1], clusters_per_batch=2, images_per_cluster=3, shuffle=False
        ... )
        >>> list(sampler)
        [[0, 1, 2, 3, 4, 5]]
    """

    @_not_rebuilt_by_a_framework
    def __init__(
        self,
        image_features: Features | None = None,
        *,
        cluster_ids: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
        num_clusters: int | None = None,
        clusters_per_batch: int,
        images_per_cluster: int,
        captions_per_image: int | Sequence[int] | npt.NDArray[Any] | Tensor = 1,
        drop_last: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        images = check_source(image_features, cluster_ids)
        self.clusters_per_batch = check_int("clusters_per_batch", clusters_per_batch, minimum=1)
        self.images_per_cluster = check_int("images_per_cluster", images_per_cluster, minimum=1)
        self.batch_size = self.clusters_per_batch * self.images_per_cluster
        self.drop_last = check_bool("drop_last", drop_last)
        self.shuffle = check_bool("shuffle", shuffle)
        self.seed = check_seed(seed)
        self.num_clusters = None if num_clusters is None else check_num_clusters(num_clusters, images)
        self._counts = check_counts(captions_per_image, images)
        one_number = isinstance(captions_per_image, numbers.Integral)
        self.captions_per_image = int(self._counts[0]) if one_number else self._counts
        self._captions = int(self._counts.sum())
        self._given_ranks = check_ranks(num_replicas, rank)
        self._ranks = self._given_ranks or ranks_of_the_group()
        self._check_enough(self._replicas()[0])

        self._position = Position()
        self._batches: EpochBatches | None = None  # of the latest epoch, for the next iteration of it
        self._set_clusters(image_features, cluster_ids)

    @property
    def epoch(self) -> int:
        """Of the next iteration."""
        return self._position.epoch

    @property
    def sampler(self) -> EpochSetter:
        """Has ``set_epoch``, for frameworks that look for it here."""
        return EpochSetter(self.set_epoch)

    @property
    def num_replicas(self) -> int:
        return self._replicas()[0]

    @property
    def rank(self) -> int:
        return self._replicas()[1]

    def _replicas(self) -> tuple[int, int]:
        return self._ranks or ranks_of_the_group() or (1, 0)

    def _check_enough(self, ranks: int) -> None:
        step_size = ranks * self.batch_size
        if self.drop_last and self._captions < step_size:
            warnings.warn(
                f"NeighborBatchSampler has no batch: its {self._captions} captions do not fill one step of "
                f"num_replicas * clusters_per_batch * images_per_cluster = {step_size}, and drop_last is True",
                stacklevel=4,
            )
        if not self.drop_last and self._captions < ranks:
            raise ValueError(
                f"drop_last=False needs at least one caption for each of num_replicas={ranks}, got {self._captions}"
            )

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, also after ``load_state_dict``."""
        ranks = self.num_replicas
        return step_count(self._captions, ranks * self.batch_size, ranks, self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        if self._ranks is not None:
            refuse_to_be_shared_out_twice(self._ranks[0])
        return Iteration(self._position, self._next_epoch, self.load_state_dict)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of, at least 0; from its first batch on, unless a loaded state says
        otherwise of this very epoch. Iterations that have begun go on as they were."""
        self._position.set_epoch(check_int("epoch", epoch, minimum=0))

    def state_dict(self, *, batches_done: int | None = None) -> State:
        """Where in the epoch the sampler is, and what that depends on; ints and bools.

        Args:
            batches_done: batches of this epoch, from its beginning, that need not come again, at most ``len``.
                None: those handed out by the latest iteration; with a plain DataLoader with workers these are ahead
                of those trained on.
        """
        if batches_done is None:
            latest = self._position.latest
            if latest is not None and latest.epoch == self._epoch():
                return latest.state_dict()
            return self._epoch().state(self._position.resume_at)
        number = check_int("batches_done", batches_done, minimum=0)
        if number > len(self):
            raise ValueError(f"batches_done must be at most the batches of an epoch, {len(self)}, got {number}")
        return self._epoch().state(number)

    def load_state_dict(self, state: State) -> None:
        """Set the epoch, and let the next iteration begin behind the batches done (with none, if all were).

        Raises:
            TypeError, ValueError: if the state is of other captions, clusters or options, or no such state; nothing is
                changed then. The number of ranks may differ if ``num_replicas * clusters_per_batch`` does not.
        """
        self._position.load(*check_state(state, self._epoch().state(0), len(self)))

    def refresh(
        self,
        image_features: Features | None = None,
        *,
        cluster_ids: Sequence[int] | npt.NDArray[Any] | Tensor | None = None,
    ) -> None:
        """Cluster anew between epochs: on new features of the same images, or with labels from elsewhere.

        Holds from the next iteration on; one that has begun goes on as it was. ``num_clusters`` and ``seed`` are those
        of the sampler. A state saved afterwards can be loaded only where the clusters are the same: keep
        ``cluster_ids`` beside it and refresh with them before ``load_state_dict``.

        Raises:
            ValueError: between ``load_state_dict`` in mid-epoch and the iteration that goes on from there.
        """
        images = check_source(image_features, cluster_ids)
        if images != len(self._counts):
            raise ValueError(f"refresh needs features or labels of all {len(self._counts)} images, got {images}")
        if self._position.resume_at:
            raise ValueError(
                f"refresh in mid-epoch: load_state_dict set batch {self._position.resume_at} of epoch {self.epoch} "
                "to go on from"
            )
        self._set_clusters(image_features, cluster_ids)

    @property
    def cluster_ids(self) -> Ints:
        """(images,) labels in use, a copy; what ``refresh(cluster_ids=...)`` takes."""
        return self._labels.copy()

    def _set_clusters(self, image_features: Features | None, cluster_ids: object) -> None:
        if image_features is None:
            labels = check_labels(cluster_ids)
        else:
            number = self.num_clusters or -(-len(self._counts) // (_IMAGES_PER_CLUSTER * self.images_per_cluster))
            make = functools.partial(cluster_features, image_features, number, seed=self.seed)
            alone = self._given_ranks is not None or ranks_of_the_group() is None
            labels = make() if alone else made_by_rank_0(make)
        self._labels = labels
        self._layout = Layout.build(self._counts, labels)
        checked = np.concatenate([self._layout.labels, self._counts]).astype("<i8")
        self._checksum = zlib.crc32(checked.tobytes())

    def _epoch(self) -> Epoch:
        options = (self.seed, self.shuffle, self.drop_last, self.images_per_cluster, self.clusters_per_batch)
        return Epoch(self.epoch, *options, self.num_replicas, self._captions, self._checksum)

    def _next_epoch(self) -> tuple[EpochBatches, int]:
        """The batches of the next iteration's epoch, the same as before if it is the same, and the rank."""
        if self._ranks is None and self.num_replicas > 1:  # which was not known when the sampler was made
            self._check_enough(self.num_replicas)
        epoch = self._epoch()
        if self._batches is None or self._batches.epoch != epoch:
            self._batches = EpochBatches(epoch, self._layout)
        return self._batches, self.rank

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None, "_position": self._position.copy()}

    def __repr__(self) -> str:
        counts: object = self.captions_per_image
        if not isinstance(counts, int):
            counts = f"<{self._captions} captions of {len(self._counts)} images>"
        return (
            f"{type(self).__name__}(cluster_ids=<{len(self._labels)} images in {self._layout.clusters} clusters>, "
            f"num_clusters={self.num_clusters}, clusters_per_batch={self.clusters_per_batch}, "
            f"images_per_cluster={self.images_per_cluster}, captions_per_image={counts}, drop_last={self.drop_last}, "
            f"shuffle={self.shuffle}, seed={self.seed}, num_replicas={self.num_replicas}, rank={self.rank})"
        )
