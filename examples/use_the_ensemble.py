"""Find similar images with a trained ensemble.

    python use_the_ensemble.py runs/photos ~/photos

RUN is the folder of a run that ``ray-dmml train`` or ``train()`` has made. FOLDER has images of any classes, in
subfolders or not. It prints the most similar images of each of the first images, with their cosine similarities. For
many images, ``ray_dmml.embed`` and ``build_index`` do the same on all cores or a cluster, with an index on the disk.
"""

import argparse

import numpy as np

from ray_dmml import list_images, load_cohort


def neighbors(run, folder, num=3):
    """(N, num) positions of the nearest images of each image, in the order of ``list_images``, and the similarities."""
    cohort = load_cohort(run)  # neither the training images nor Ray are needed
    embeddings = cohort.embed_files(folder)  # (N, sum of the peers' D), rows of length 1
    similarities = embeddings @ embeddings.T
    np.fill_diagonal(similarities, -1)  # an image does not find itself
    return similarities.argsort(axis=1)[:, ::-1][:, :num], similarities


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    files = list_images(arguments.folder)
    nearest, similarities = neighbors(arguments.run, arguments.folder)
    for query in range(min(5, len(files))):
        print(files[query])
        for found in nearest[query]:
            print(f"    {similarities[query, found]:.2f}  {files[found]}")
