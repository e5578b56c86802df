"""Video, pictures and files, in and out."""
