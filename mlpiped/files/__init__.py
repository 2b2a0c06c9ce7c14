"""What the files are now: walked, hashed, remembered by what `stat` says of them."""
