import sys
import time, subprocess, re, pathlib
from numba import cuda
from numba.cuda import types
from fastce.cuda import whole, parts, finish, sums
from cuda.core import Linker, LinkerOptions, ObjectCode
V=parts.Variant
D=str(next(pathlib.Path(sys.prefix).rglob("nvdisasm")))
def build(v, maker, cc, lb):
    sig = types.void(*[types.int64]*len(finish.INTEGERS), *[types.float64]*len(finish.FLOATS))
    try:
        t=time.time(); ptx,_=cuda.compile(maker(v), sig, cc=cc, device=False, abi='numba', output='ptx', launch_bounds=lb); t=time.time()-t
    except Exception as e: print("FAIL",v,type(e).__name__,str(e)[-400:]); return
    ptx = ptx if isinstance(ptx,bytes) else ptx.encode()
    o=Linker(ObjectCode.from_ptx(ptx), options=LinkerOptions(arch=f'sm_{cc[0]}{cc[1]}')).link('cubin')
    open('k.cubin','wb').write(bytes(o.code))
    s=subprocess.run([D,'k.cubin'],capture_output=True,text=True).stdout
    regs=max(int(x,16) for x in re.findall(r'EIATTR_REGCOUNT.*?\.word\s+\S*index@\S+\s+/\*\w+\*/\s+\.word\s+(0x[0-9a-f]+)',s,re.S))
    c=lambda p: len(re.findall(p,s))
    print(f"sm_{cc[0]}{cc[1]} {v.dtype:9}{v.task:9}{v.regime:8}T={v.threads:<5}V={v.vectors} {v.beyond:7} regs={regs} LDL={c(r'LDL')} STL={c(r'STL')} LDG128={c(r'LDG.E.128')} STG128={c(r'STG.E.128')} LDGSTS128={c(r'LDGSTS.E[.A-Z]*128')} EX2={c('MUFU.EX2')} compile={t:.1f}s",flush=True)
for cc in ((8,0),(9,0),(10,0)):
    build(V('float32','gradient','row',32,128,8), whole.row_kernel,cc,(128,4))
    build(V('bfloat16','gradient','row',32,128,4), whole.row_kernel,cc,(128,4))
    build(V('bfloat16','gradient','row',512,512,2), whole.row_kernel,cc,(512,2))
    build(V('bfloat16','gradient','row',512,512,4), whole.row_kernel,cc,(512,2))
    build(V('bfloat16','gradient','row',1024,1024,4), whole.row_kernel,cc,(1024,1))
    build(V('float32','gradient','row',1024,1024,4), whole.row_kernel,cc,(1024,1))
    build(V('bfloat16','gradient','row',1024,1024,4,'shared'), whole.row_kernel,cc,(1024,1))
    build(V('bfloat16','gradient','row',1024,1024,2,'memory'), whole.row_kernel,cc,(1024,1))
    build(V('float32','gradient','strided',1,256), whole.strided_kernel,cc,(256,2))
    build(V('float32','loss','strided',1,256), whole.strided_kernel,cc,(256,2))
