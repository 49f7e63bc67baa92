import pytest, time, json
@pytest.mark.parametrize("n",["plain","rows","dynamic","text","embeds","last","no_fam","no_memory","fp16","bf16"])
def test_x(bundles,n):
    t=time.time(); p=bundles(n); m=json.loads((p/"manifest.json").read_text())["parity"]; print(n,time.time()-t,max(m["logits_error"]),max(m["state_error"]),m["fam_growth"],m["fam_norm"][-1])
