"The drawings of this repository's experiments and of the paper's figures, each made from a results file."
