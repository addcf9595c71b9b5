"""The names that a user may write, where what they stand for needs torch. Standard library only."""

from __future__ import annotations

SPLITS = ("stratified", "shuffled")  # see data.split
OWN_IMAGES = ("folder", "manifest")  # the data sets that are a user's own images, which have no size of their own
VIEW_DESCRIPTIONS = {  # see data.views
    "shift": "images are moved a little, never mirrored (flip-crop mirrors, for images whose left may be their right)",
    "flip-crop": "images are moved a little, and mirrored every other time (shift never mirrors, for digits, signs, writing)",
    "crop": "parts of images, never mirrored (imagenet mirrors, for images whose left may be their right)",
    "imagenet": "parts of images, mirrored every other time (crop never mirrors, for arrows, signs, writing)",
}
