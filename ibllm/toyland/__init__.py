"A small generated world that eight sensors record: a user of the library like any other."
