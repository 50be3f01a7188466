"""Random 3-D objects and their images, for make_objects.py."""
