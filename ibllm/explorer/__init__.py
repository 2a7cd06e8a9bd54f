"Mix modalities, move the cache, look inside, and watch the answer: what is shown, and the controls for it."
