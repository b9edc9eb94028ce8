"""Preference data and tokenizers -> pairs that two models with different tokenizers can read. In reading order:

preferences     a file, TFDS or the hub -> PreferencePair; every row is used, or left out and counted
formats         .jsonl, .json, .csv, .parquet -> rows
read_row        one row, in any usual column layout -> pairs; answers: which answer of it is better
dialogue        conversations as data sets write them -> messages
columns         what becomes of fields that nobody reads
templates       messages -> the text around them, by a model's chat template
prompts         that text -> token ids, within a limit on both sides
tokens          text -> token ids, and where each token ends in the bytes of the text
backends        tokenizers opened and copied; tokenizer_json: what kind they are, and the bytes of their tokens
spelling        a text spelled with the bytes of its tokens
cuts            where a text may be cut without its normal form changing
spans           two tokenizations of a response -> aligned spans
prepare         all of it: PreferencePair -> AlignedPair
overview        `ctpd inspect --data`: what becomes of a data set
"""
