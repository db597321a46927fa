"""Simulator check of the row and strided kernels against the oracle."""
import os
os.environ["NUMBA_ENABLE_CUDASIM"]="1"
import sys
import numpy as np, ml_dtypes, itertools, warnings, time
from numba import cuda
from fastce.cuda import whole, parts, finish, simulated, formats
from tests import oracle
from tests.checks import *
def run(maker, variant, z, grid, shared=0, **kw):
    out = np.full_like(z, 7)
    N,C = z.shape
    ld = loss_dtype(z.dtype)
    res = {k: np.full(N, 9, np.int64 if k=="predicted" else ld) for k in ("losses","lse","entropy","predicted")}
    v = dict.fromkeys(finish.INTEGERS, 0)
    keep=[]
    def ad(a): keep.append(a); return a.ctypes.data
    v.update(z=ad(z), z_outer=z.strides[0], z_class=z.strides[1], out=ad(out), out_outer=out.strides[0], out_class=out.strides[1], rows=N, inner=1, classes=C, ignore=-100)
    f = dict(keep=1.0, spread=0.0, z_loss=0.0, cap=1.0, nll_scale=1.0, z_scale=1.0)
    for k in res: v[k]=ad(res[k])
    t = kw.get("targets")
    if t is not None: v.update(targets=ad(t), target_code=formats.CODES[t.dtype.name])
    h = kw.get("soft")
    if h is not None: v.update(soft=ad(h), soft_outer=h.strides[0], soft_class=h.strides[1], soft_code=formats.CODES[h.dtype.name])
    w = kw.get("weight")
    if w is not None: v.update(weight=ad(w), weight_code=formats.CODES[w.dtype.name])
    e = kw.get("smoothing",0.0); f.update(keep=1-e, spread=e/C, z_loss=kw.get("z_loss",0.0), cap=kw.get("softcap") or 1.0)
    v.update({"lse":v["lse"]})
    args=[np.int64(v[k]) for k in finish.INTEGERS]+[np.float64(f[k]) for k in finish.FLOATS]
    # a lent pad of 1 item around is not allowed
    simulated.memory=[(a.ctypes.data, a.ctypes.data+ (a.strides[0]*(a.shape[0]-1)+ (a.strides[1]*(a.shape[1]-1) if a.ndim==2 else 0) + a.itemsize)) for a in keep]
    cuda.jit(maker(variant))[grid, variant.block, 0, parts.SCRATCH+shared](*args)
    simulated.forget_warps()
    return res, out
V=parts.Variant
bad=0
def check(name, fn):
    global bad
    try: fn(); print("ok  ",name, flush=True)
    except Exception as ex:
        bad+=1; print("FAIL",name,type(ex).__name__,str(ex)[:300], flush=True)
regimes=[("warp",dict(threads=16,block=32,vectors=1),whole.row_kernel,0)]
def case(dt, reg, C, opts, scale=2.0, seed=0, task="gradient"):
    name,kw,maker,sh=reg
    def fn():
        N=3
        z=draw((N,C),dt,scale=scale,seed=seed); t=draw_targets((N,),C); t[1]=-100
        o=dict(opts); soft=None
        if o.pop("soft",None): soft=draw_soft((N,C),np.float32); 
        w=draw_weight(C,loss_dtype(dt)) if o.pop("weight",None) else None
        spread=bool(soft is not None or o.get("smoothing"))
        var=V(dt if isinstance(dt,str) else np.dtype(dt).name, task, "row" if name!="strided" else "strided", spread=spread, capped="softcap" in o, **kw)
        grid=-(-N//(kw["block"]//kw["threads"])) if name!="strided" else -(-N//8)
        r,g=run(maker,var,z,grid,sh,targets=None if soft is not None else t,soft=soft,weight=w,**o)
        tg = t if soft is None else soft
        ok=dict(weight=w); 
        if "smoothing" in o: ok["label_smoothing"]=o["smoothing"]
        for k in("z_loss","softcap"):
            if k in o: ok[k]=o[k]
        want=oracle.cross_entropy(z,tg,reduction="none",**ok)
        assert_loss(r["losses"],want.loss,dt)
        if task=="gradient": assert_gradient(g,want.grad,dt)
        if task=="stats":
            s=oracle.cross_entropy_stats(z,tg,weight=w)
            assert_close(r["entropy"],s.entropy,4e-6); assert_close(r["lse"],s.lse,3e-7); assert (r["predicted"]==s.predicted).all(), (r["predicted"],s.predicted)
    check(f"{name} {dt} C={C} {opts} {task}",fn)
t0=time.time()
for reg in regimes:
    C={"warp":61,"block":61,"shared":333,"memory":333,"strided":13}[reg[0]]
    for dt in ("float32","float64","float16",ml_dtypes.bfloat16):
        Cd=C if dt not in("float64",) or reg[0] in("shared","memory","strided") else C//2
        case(dt,reg,C if dt!="float64" else 29,{})
    Cf=C
    for o in ({"weight":1},{"smoothing":0.1},{"smoothing":0.1,"weight":1,"z_loss":1e-2},{"soft":1},{"softcap":3.0}): case("float32",reg,Cf,o)
    case("float32",reg,Cf,{},task="stats"); case("float32",reg,Cf,{},task="loss",scale=30.0)
print("failures",bad,"seconds",round(time.time()-t0,1))

# the same bits at every batch position (odd C: every alignment), and from every regime
C=61; row=draw((1,C),np.float32,scale=3.0,seed=5); z=np.repeat(row,5,axis=0); t=np.full(5,7)
got=[]
for kw,mk,grid in ((dict(threads=16,block=32,vectors=1),whole.row_kernel,3),(dict(threads=32,block=32,vectors=1),whole.row_kernel,5),(dict(threads=32,block=32,vectors=1,beyond="memory"),whole.row_kernel,5),(dict(threads=1,block=8),whole.strided_kernel,1)):
    r,g=run(mk,V("float32","gradient","row",**kw),z,grid,0,targets=t); got.append((r["losses"],g))
    print(kw, "rows alike:", all(same_bits(g[0],g[i]) for i in range(5)) and len(set(r["losses"].tolist()))==1)
print("regimes alike:", all(same_bits(got[0][0],x[0]) and same_bits(got[0][1],x[1]) for x in got))
for gap in (5., 9.9, 25., 60.):
    z=draw((3,61),np.float32); z[:, 17]=gap+z.max(); t=np.full(3,17)
    def fn(regime=gap):
        for kw,mk,grid in ((dict(threads=16,block=32,vectors=1),whole.row_kernel,2),(dict(threads=1,block=8),whole.strided_kernel,1)):
            r,g=run(mk,V("float32","gradient","row",**kw),z,grid,0,targets=t)
            want=oracle.cross_entropy(z,t,reduction="none"); assert_loss(r["losses"],want.loss,np.float32,anywhere=gap>=10); assert_gradient(g,want.grad,np.float32)
    check(f"confident by {gap}",fn)
