def run(folder, updates, restarts):
    return "", 0
