BEGIN TRANSACTION;
CREATE TABLE noise (
    machine text not null, label text not null, version text not null, spread real not null,
    pairs integer not null, at text not null, provenance integer references provenance,
    primary key (machine, label));
CREATE TABLE provenance (id integer primary key, facts text unique not null);
INSERT INTO "provenance" VALUES(1,'{"system": "Linux 1"}');
INSERT INTO "provenance" VALUES(2,'{"system": "Linux 2"}');
INSERT INTO "provenance" VALUES(3,'{"system": "Linux 3"}');
CREATE TABLE runs (
    id integer primary key, machine text not null, commit_hash text not null, environment text not null,
    benchmark text not null, version text not null, place integer not null, params text not null,
    at text not null, status text not null, samples text not null, number integer, reason text not null,
    seconds real not null, purpose text not null, provenance integer references provenance);
INSERT INTO "runs" VALUES(1,'m','{commit}','{environment}','w.W.time_n','1',0,'["100"]','2026-11-28T06:58:31.434+00:00','ok','[1.0710000424296595e-06, 7.310000000870787e-07]',1,'',3.77557537999564374331e-01,'bench',1);
INSERT INTO "runs" VALUES(2,'m','{commit}','{environment}','w.W.time_n','1',1,'["1000"]','2026-11-28T06:58:31.807+00:00','ok','[2.013000084843952e-06, 8.110000635497272e-07]',1,'',3.70887590000165801029e-01,'bench',1);
INSERT INTO "runs" VALUES(3,'m','{commit}','{environment}','w.W.track_n','1',0,'["100"]','2026-11-28T06:58:32.229+00:00','ok','[100.0]',NULL,'',4.19873410000036528799e-01,'bench',1);
INSERT INTO "runs" VALUES(4,'m','{commit}','{environment}','w.W.track_n','1',1,'["1000"]','2026-11-28T06:58:32.603+00:00','ok','[1000.0]',NULL,'',3.7082226399979845155e-01,'bench',1);
INSERT INTO "runs" VALUES(5,'m','{commit}','{environment}','w.W.time_n','1',2,'["1000"]','2026-11-28T06:58:34.471+00:00','ok','[1.1120000635855831e-06, 6.909995136084035e-07]',1,'',3.71480253000299853738e-01,'bench',3);
INSERT INTO "runs" VALUES(6,'m','{commit}','{environment}','w.W.track_n','1',2,'["1000"]','2026-11-28T06:58:34.842+00:00','ok','[1000.0]',NULL,'',3.69677053000486921519e-01,'bench',3);
CREATE INDEX by_commit on runs (machine, commit_hash, environment, benchmark, place);
COMMIT;
